"""What no class holds leaves with its own code, as servers that rewrite models want it."""

import json
import operator
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from saved import save, tiny
from torch import fx
from transformers import AutoModelForCausalLM

from llmnorm import list_norms
from llmnorm.cli import run_command
from llmnorm.evaluation.loading import Loaded, Source
from llmnorm.export import Form, command
from llmnorm.export.custom import serving_form, write_custom
from llmnorm.modeling.residual import NormSpec

HALF_MIX = {"name": "mix_ln", "fraction": 0.5}  # of two layers one is Post-LN
SCHEMES: dict[str, tuple[Any, dict[str, Any]]] = {
    "constants": (HALF_MIX, {"norm": {"op": "rmsnorm", "unit_offset": True, "scale": 3.0}}),
    "full_width": ("lns", {"norm": {"op": "rmsnorm", "scale": 3.0}, "qk_norm": "full_width"}),
    "pointwise": ("lns", {"norm": "derf", "tie_word_embeddings": True, "mlp": "plain"}),
    "muP": ("normformer", {"parametrization": {"name": "mup", "base_width": 16}}),
    "biases": (HALF_MIX, {"norm": {"op": "rmsnorm", "bias": True}, "qk_norm": "per_head"}),
    "two_streams": ("siamese_norm", {}),
    "positions": ("sub_ln", {"position": "learned", "embedding": "norm"}),
    "ngpt": ("ngpt", {"norm": {"op": "l2norm"}}),
}


def write(folder: Path, model: Any, *, pointwise: bool = False) -> None:
    source = Loaded(Source(str(folder), None), model, None, None)
    folder.mkdir(parents=True)
    form = serving_form(Form.of(model), pointwise=pointwise)
    write_custom(folder, form, source, torch.float32, "5GB")


@pytest.fixture(scope="module")
def wrong(tmp_path_factory) -> dict[str, list[str]]:
    """What a server without llmnorm finds wrong in the folder of each scheme."""
    root = tmp_path_factory.mktemp("custom")
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 257, (2, 9), generator=generator)
    for name, (placement, options) in SCHEMES.items():
        model = tiny(placement, **options).double()
        write(root / name, model, pointwise=name == "pointwise")
        with torch.no_grad():
            logits = model(ids).logits
        save_file({"ids": ids, "logits": logits}, root / f"{name}.safetensors")
    home = tmp_path_factory.mktemp("home")
    done = subprocess.run(
        [sys.executable, "-P", str(Path(__file__).with_name("server.py")), str(root)],
        capture_output=True,
        text=True,
        cwd=home,
        env={"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PATH": os.defpath},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_custom_folder_is_what_a_server_wants(scheme, wrong):
    assert wrong[scheme] == []


def looks_like_rmsnorm(norm: torch.nn.Module) -> bool:
    """Whether a pattern matcher on the traced computation would take it for one.

    That is x * rsqrt(mean(x^2) + eps), times something or not, and nothing after it.
    """

    def peel(node: Any) -> Any:
        while isinstance(node, fx.Node) and node.target == "to":
            node = node.args[0]
        return node

    nodes = list(fx.symbolic_trace(norm).graph.nodes)
    x = nodes[0]

    def is_root(node: fx.Node) -> bool:
        mean = peel(node.args[0].args[0]) if node.target is torch.rsqrt else None
        return mean is not None and mean.target == "mean" and peel(mean.args[0].args[0]) is x

    products = [node for node in nodes if node.target is operator.mul]
    roots = [node for node in nodes if is_root(node)]
    normalized = [p for p in products if roots and roots[0] in map(peel, p.args)]
    if not normalized:
        return False
    tensors = [p for p in products if all(isinstance(arg, fx.Node) for arg in p.args)]
    gained = [p for p in tensors if normalized[0] in map(peel, p.args)]
    return peel(nodes[-1].args[0]) is [*normalized, *gained][: 1 + len(gained[:1])][-1]


@pytest.mark.parametrize("op", list_norms())
@pytest.mark.fast
def test_what_looks_like_rmsnorm_is_one(op):
    norm = NormSpec(op=op, options={}).build(8).double().eval()
    with torch.no_grad():
        for parameter in norm.parameters():
            if parameter.requires_grad:
                parameter += torch.rand_like(parameter)
    assert looks_like_rmsnorm(norm) == (op == "rmsnorm")


def test_gain_and_bias_of_pointwise_norms_are_folded_on_request(tmp_path):
    model = tiny("pre_ln", norm="derf").double()
    write(tmp_path / "folded", model, pointwise=True)
    config = json.loads((tmp_path / "folded" / "config.json").read_text())
    assert config["attention_bias"]
    assert config["mlp_bias"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=torch.float64)
    for layer in loaded.model.layers:
        assert bool((layer.attn_residual.pre.weight == 1).all())
        assert not layer.mlp_residual.pre.bias.any()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_scheme_keeps_its_name_for_people(tmp_path):
    write(tmp_path / "out", tiny(HALF_MIX, qk_norm="per_head"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["placement"] is None  # the wiring alone says what is computed
    assert config["trained_as"]["placement"]["name"] == "mix_ln"
    assert config["trained_as"]["norm"]["op"] == "rmsnorm"
    assert config["trained_as"]["qk_norm"] == "per_head"


def test_auto_brings_the_code_along_where_no_class_holds_the_model(tmp_path, capsys):
    save(tmp_path / "model", HALF_MIX)
    words = [tmp_path / "model", "--out", tmp_path / "out", "--dtype", "bf16"]
    run_command(command, "llmnorm export", [str(word) for word in words])
    told = capsys.readouterr().out
    assert "LlmNormForCausalLM: own code. No class holds this model" in told
    assert "slot out" in told
    parity = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert parity["passed"]
    assert parity["target"] == "custom"
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count(", trust_remote_code=True)") == card.count(".from_pretrained(") > 0
