"""The certificate passes what is right, and says what is wrong with what is not."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from schemes import tokens
from wiring import model_of

from llmnorm.errors import EnvironmentProblem, ParityError
from llmnorm.export import Form, certificate, stranger
from llmnorm.export.certificate import certify, compare, uncast
from llmnorm.export.comparison import EXACT, FLOOR, Claim, Ours
from llmnorm.export.fitting import Fit, fit
from llmnorm.export.form import Held
from llmnorm.export.visiting import Visit, kinds, visit

TEXT = tokens(2, 24)
WEIGHTS, CONFIG = "model.safetensors", "config.json"
Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], None]


def write(folder: Path, held: Fit, dtype: torch.dtype) -> Path:
    """A folder of a class, by transformers and safetensors alone."""
    held.host.config(held.form, dtype).save_pretrained(folder)
    tensors = held.host.write(held.form, dtype)
    cast = {name: tensor.to(dtype).clone().contiguous() for name, tensor in tensors.items()}
    save_file(cast, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def setting(name: str, value: Any) -> Change:
    return lambda config, weights: config.update({name: value})


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def apply(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
        weights[name] = change(weights[name]).contiguous()

    return apply


def head_is_the_embedding(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()


def without_a_bias(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.1.self_attn.k_proj.bias"]


# What is done to a good folder, where it shows first, and what is said of it.
SABOTAGE: dict[str, tuple[Change, str, str]] = {
    "gain": (
        tensor("model.layers.1.input_layernorm.weight", torch.ones_like),
        "layer 1",
        "loaded in float32 it changes the logits",
    ),
    "eps": (setting("rms_norm_eps", 1e-5), "layer 0", "not wired as our model"),
    "query rows": (
        tensor("model.layers.2.self_attn.q_proj.weight", lambda rows: rows.flip(0)),
        "layer 2",
        "loaded in float32",
    ),
    "head": (head_is_the_embedding, "head", "loaded in float32"),
    "rope": (
        setting("rope_parameters", {"rope_type": "default", "rope_theta": 500000.0}),
        "layer 0",
        "not wired as our model",
    ),
    "bias": (without_a_bias, "layer 1", "lack model.layers.1.self_attn.k_proj.bias"),
    "embedding": (
        tensor("model.embed_tokens.weight", lambda table: table * 1.01),
        "embedding",
        "loaded in float32",
    ),
    "final norm": (
        tensor("model.norm.weight", torch.ones_like),
        "final norm",
        "loaded in float32",
    ),
    "activation": (setting("hidden_act", "gelu_pytorch_tanh"), "layer 0", "not wired as our"),
}


@dataclass(frozen=True)
class Seen:
    """A folder's claim, and what was found in it."""

    claim: Claim
    found: Visit
    exact: Visit | None

    def parity(self) -> dict[str, Any]:
        return compare(self.claim, self.found, self.exact)


@pytest.fixture(scope="module")
def claim() -> Claim:
    """A llama of three layers with biases on attention."""
    source = model_of("pre_ln", depth=3, attention_bias=True, hidden_act="gelu")
    held = fit(Form.of(source), "llama")
    assert held is not None
    return Claim(source, held, held.form, torch.float32, TEXT)


@pytest.fixture(scope="module")
def seen(claim: Claim, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """One process without llmnorm for all folders: starting it takes longer than its work."""
    root, claims = tmp_path_factory.mktemp("folders"), {"good": claim}
    assert claim.fit is not None
    good = write(root / "good", claim.fit, torch.float32)
    for name, (change, _, _) in SABOTAGE.items():
        folder = shutil.copytree(good, root / name)
        config, weights = json.loads((good / CONFIG).read_text()), load_file(good / WEIGHTS)
        change(config, weights)
        (folder / CONFIG).write_text(json.dumps(config))
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        claims[name] = claim
    shutil.copytree(good, root / "cut")
    (root / "cut" / WEIGHTS).write_bytes((good / WEIGHTS).read_bytes()[:-100])
    claims["cut"] = claim
    claims |= _others(root, claim)
    with ExitStack() as stack:
        asked: dict[Path, list[torch.dtype]] = {}
        places, twins = {}, {}  # folders of one form and config have one twin
        for name, one in claims.items():
            same = id(one.form), (root / name / CONFIG).read_text()
            if same not in twins:
                twins[same] = stack.enter_context(uncast(root / name, one))
            asked |= {root / name: kinds(one.dtype), **twins[same]}
            places[name] = (root / name, *twins[same])
        found = dict(zip(asked, visit(asked, TEXT, trust_remote_code=bool(asked)), strict=True))
    return {
        name: Seen(claims[name], found[own], found[twin[0]] if twin else None)
        for name, (own, *twin) in places.items()
    }


def _others(root: Path, claim: Claim) -> dict[str, Claim]:
    """Folders in bfloat16 and with code of their own."""
    half = Claim(claim.source, claim.fit, claim.form, torch.bfloat16, TEXT)
    assert claim.fit is not None
    write(root / "rounded", claim.fit, torch.bfloat16)
    config = json.loads((write(root / "hidden", claim.fit, torch.bfloat16) / CONFIG).read_text())
    config["hidden_act"] = "gelu_pytorch_tanh"
    (root / "hidden" / CONFIG).write_text(json.dumps(config))
    source = model_of("mix_ln", depth=2, norm="dyt")
    for name in ("custom", "importing"):
        source.save_pretrained(root / name)
    code = root / "importing" / "modeling_llmnorm.py"
    code.write_text(f"import llmnorm\n{code.read_text()}")
    own = Claim(source, None, None, torch.float64, TEXT)
    return {"rounded": half, "hidden": half, "custom": own, "importing": own}


def test_a_good_export_is_our_model_bit_by_bit_before_rounding(seen):
    parity = seen["good"].parity()
    assert parity["passed"], parity["summary"]
    assert parity["failures"] == []
    assert parity["first_deviating_layer"] is None
    assert parity["errors"]["class"]["rel"] < 1e-12
    assert parity["errors"]["float32"]["rel"] < 1e-5
    assert parity["generation"]["equal"]
    assert parity["generation"]["cached_equal_uncached"]


@pytest.mark.parametrize("what", SABOTAGE)
def test_what_is_wrong_is_found_and_the_first_layer_named(seen, what):
    _, layer, words = SABOTAGE[what]
    parity = seen[what].parity()
    assert not parity["passed"]
    assert parity["first_deviating_layer"] == layer
    assert any(words in failure for failure in parity["failures"]), parity["failures"]
    assert parity["summary"][0].startswith("parity FAILED: pre_ln + rmsnorm as LlamaForCausalLM")
    assert f"the first to deviate: {layer}" in parity["summary"][-1]


def test_weights_that_are_cut_off_are_one_clear_line(seen):
    parity = seen["cut"].parity()
    assert not parity["passed"]
    assert len(parity["failures"]) == 1
    assert parity["failures"][0].startswith("it cannot be loaded: ")
    assert "\n" not in parity["failures"][0]


def test_rounding_may_be_what_it_is_in_the_source(seen):
    parity = seen["rounded"].parity()
    assert parity["passed"], parity["summary"]
    assert parity["errors"]["bfloat16"]["rel"] > FLOOR
    assert parity["errors"]["class"]["rel"] < EXACT


def test_rounding_hides_no_wrong_activation(seen):
    parity = seen["hidden"].parity()
    assert parity["errors"]["bfloat16"]["rel"] < parity["tolerances"]["bfloat16"]
    assert not parity["passed"]
    assert parity["first_deviating_layer"] == "layer 0"


def test_a_folder_with_its_own_code_is_certified_too(seen):
    parity = seen["custom"].parity()
    assert parity["passed"], parity["summary"]
    assert (parity["target"], parity["class"]) == ("custom", "LlmNormForCausalLM")
    assert parity["scheme"] == "mix_ln + dyt"


def test_llmnorm_cannot_be_imported_where_folders_are_loaded(seen):
    [failure] = seen["importing"].parity()["failures"]
    assert "llmnorm" in failure
    assert failure.startswith(("it cannot be loaded: ImportError", "it cannot be loaded: Module"))


def test_a_gap_of_the_one_eps_is_called_that(seen):
    """One norm of the model has another eps, which the class cannot have."""
    claim = seen["good"].claim
    form = claim.form.copy()
    sub = next(sub for sub in form.sublayers() if sub.name == "layer 1 mlp")
    held = sub.get("pre")
    sub.put("pre", Held(held.spec.having(eps=0.1), held.tensors))
    own = Claim(form.to_model(), Fit(claim.fit.host, form), form, claim.dtype, TEXT)
    parity = Seen(own, seen["good"].found, seen["good"].exact).parity()
    assert not parity["passed"]
    assert parity["errors"]["class"]["rel"] < EXACT
    assert parity["errors"]["eps"]["rel"] > FLOOR
    assert "the class's one eps for all norms changes the logits" in parity["failures"][0]


def test_a_wrong_fold_is_called_that(seen):
    claim = seen["good"].claim
    source = model_of("pre_ln", depth=3, attention_bias=True, hidden_act="gelu")
    with torch.no_grad():
        source.model.layers[1].mlp_residual.pre.weight[0] += 0.1
    own = Claim(source, claim.fit, claim.form, claim.dtype, TEXT)
    parity = Seen(own, seen["good"].found, seen["good"].exact).parity()
    assert not parity["passed"]
    assert parity["errors"]["fold"]["rel"] > FLOOR
    assert parity["failures"][0].startswith("folding changes the logits")


def test_a_loss_that_is_off_though_its_logits_are_right_is_found(seen):
    one = seen["good"]
    passes = {name: dict(found) for name, found in one.found.passes.items()}
    passes["float32"]["loss"] = passes["float32"]["loss"] + 0.01
    parity = Seen(one.claim, Visit(one.found.facts, passes), one.exact).parity()
    assert len(parity["failures"]) == 1
    assert parity["failures"][0].startswith("its loss in float32 is 0.01 nats off")


def test_logits_that_are_no_numbers_are_not_passed(seen):
    one = seen["good"]
    passes = {name: dict(found) for name, found in one.found.passes.items()}
    passes["float32"]["logits"] = passes["float32"]["logits"] * float("nan")
    assert not Seen(one.claim, Visit(one.found.facts, passes), one.exact).parity()["passed"]


@pytest.mark.parametrize(
    ("other", "uncached", "said"),
    [
        ([3, 2], [3, 2], []),
        ([3, 1], [3, 1], []),  # a tie: 5.0 and 4.99999
        ([3, 0], [3, 0], ["greedy generation differs from the source's at token 2"]),
        ([3, 2], [3, 0], ["greedy generation with a cache differs from that without"]),
    ],
)
@pytest.mark.fast
def test_generation_may_differ_only_where_the_source_is_undecided(other, uncached, said):
    from llmnorm.export.verdict import about_generation

    scores = torch.tensor([[0.0, 0.0, 0.0, 9.0], [0.0, 4.99999, 5.0, 0.0]], dtype=torch.float64)
    mine = {"generated": torch.tensor([3, 2]), "scores": scores, "logits": torch.tensor([-1.0, 1])}
    theirs = {"generated": torch.tensor(other), "generated_uncached": torch.tensor(uncached)}
    ours = Ours(mine, {}, {}, {}, {}, "float32")
    assert about_generation(ours.judge_generation(theirs, limit=FLOOR)) == said


def test_certify_writes_what_was_found_beside_the_weights(claim, seen, tmp_path, monkeypatch):
    found = [seen["good"].found, seen["good"].exact]
    monkeypatch.setattr(certificate, "visit", lambda folders, *_, **__: found[: len(folders)])
    folder = write(tmp_path / "out", claim.fit, torch.float32)
    (folder / "parity.json").write_text("of other weights")
    (tmp_path / "out.twin" / "left by a killed one").mkdir(parents=True)
    before = claim.source.state_dict()["model.norm.weight"].clone()
    parity = certify(
        folder,
        claim.source,
        claim.fit,
        torch.float32,
        TEXT,
        trust_remote_code=False,
        text_source="seeded",
    )
    assert parity["passed"], parity["summary"]
    assert json.loads((folder / "parity.json").read_text()) == parity
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # the twin is gone
    assert set(parity["errors"]) == {"fold", "eps", "class", "float64", "float32"}
    assert set(parity["errors"]["fold"]) == {"max_abs_logit", "rel", "loss_diff"}
    assert set(parity["errors"]) == set(parity["tolerances"])
    assert set(parity["files"]) == {CONFIG, "generation_config.json", WEIGHTS} & {
        path.name for path in folder.iterdir()
    }
    assert all(len(digest) == 64 for digest in parity["files"].values())
    assert set(parity["versions"]) == {"llmnorm", "torch", "transformers", "python"}
    assert parity["text"]["tokens"] == TEXT.numel()
    assert parity["text"]["source"] == "seeded"
    assert torch.equal(claim.source.state_dict()["model.norm.weight"], before)
    assert claim.source.dtype == torch.float64


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What is run instead of the stranger."""
    path = tmp_path / "script.py"
    monkeypatch.setattr(stranger, "__file__", str(path))
    return path


def test_a_process_that_dies_is_one_clear_line(script):
    script.write_text("import sys; sys.stderr.write('loading\\nout of memory\\n'); sys.exit(7)")
    with pytest.raises(EnvironmentProblem, match=r"ended with 7: out of memory$"):
        visit({Path("x"): []}, TEXT, trust_remote_code=False)


def test_a_process_that_hangs_is_given_up(script):
    script.write_text("import time; time.sleep(60)")
    with pytest.raises(EnvironmentProblem, match=r"was not done after 0\.3 s"):
        visit({Path("x"): []}, TEXT, trust_remote_code=False, timeout_seconds=0.3)


@pytest.mark.fast
def test_a_failed_certificate_exits_with_1():
    assert ParityError("x").exit_code == 1
