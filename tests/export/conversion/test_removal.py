"""Norms are removed step by step, fold into matrices, and leave as a stock class."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from schemes import tokens
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM
from wiring import model_of

from llmnorm.cli import run_command
from llmnorm.config import load_run_config
from llmnorm.data import Prepared
from llmnorm.errors import ConfigError
from llmnorm.export import Form, convert
from llmnorm.export import command as export
from llmnorm.export.conversion.fit import fit_sites
from llmnorm.export.conversion.removal import fold_removed, with_removals
from llmnorm.export.conversion.rewire import changed_sites, with_weights_of
from llmnorm.export.conversion.schedule import removal_steps
from llmnorm.modeling.fixed_std import FixedStd
from llmnorm.training.loop import train

from ...training.conftest import Killed, metrics, numbers, stop_after, tiny_words

PRETRAIN = Path(__file__).resolve().parents[3] / "train" / "pretrain.py"
STEPS = 12


def removing(model: Any, *, removed: bool) -> Any:
    """A model in which every norm is to be removed, or is, with constants of its own."""
    config = with_removals(model.config, 300, 0.1)
    converted = with_weights_of(model, config).double()
    fit_sites(model, converted, changed_sites(model.config, config), tokens())
    for index, module in enumerate(m for m in converted.modules() if isinstance(m, FixedStd)):
        if removed:
            for parameter, value in ((module.removed, 1.0), (module.std, 1.0 + 0.1 * index)):
                torch.nn.init.constant_(parameter, value)
            torch.nn.init.constant_(module.std_first, 1.0 + 0.1 * index)
    return converted


def test_the_schedule_is_the_published_one_for_its_depth_and_steps() -> None:
    sites = [f"model.layers.{i}.{k}_residual.pre" for i in range(12) for k in ("attn", "mlp")]
    steps, uniform = removal_steps([*sites, "model.norm"], 300)
    mlp = [steps[f"model.layers.{i}.mlp_residual.pre"] for i in range(12)]
    attention = [steps[f"model.layers.{i}.attn_residual.pre"] for i in range(12)]
    assert mlp == list(range(20, 44, 2))
    assert attention == list(range(44, 104, 5))
    assert (steps["model.norm"], uniform) == (104, 116)
    short, uniform = removal_steps([*sites, "model.norm"], 30)
    assert max(short.values()) == math.ceil(10.4)
    assert uniform == 12
    with pytest.raises(ConfigError, match="--steps 9 is too few"):
        removal_steps(sites, 9)


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("placement", ["pre_ln", "lns", "peri_ln", "post_ln"])
def test_a_model_begins_as_it_was(norm: str, placement: str) -> None:
    model = model_of(placement, norm=norm)
    converted = removing(model, removed=False)
    assert "rmsnorm" not in str(converted.config.residuals)
    torch.testing.assert_close(converted(tokens()).logits, model(tokens()).logits)
    config = converted.config
    assert type(config).from_dict(config.to_dict()).residuals == config.residuals


@pytest.mark.parametrize("norm", ["rmsnorm", {"op": "layernorm", "bias": False}])
@pytest.mark.parametrize("placement", ["pre_ln", "lns"])
def test_what_is_left_folds_into_matrices(norm: Any, placement: str) -> None:
    model = removing(model_of(placement, norm=norm), removed=True)
    form = fold_removed(Form.of(model))
    assert form.final is None
    assert not any(sub.spec.slots() for sub in form.sublayers())
    torch.testing.assert_close(form.to_model()(tokens()).logits, model(tokens()).logits)


def test_biases_go_into_the_linear_layers_but_not_into_the_head() -> None:
    model = removing(model_of("pre_ln", norm="layernorm"), removed=True)
    with pytest.raises(ConfigError, match="the final norm has a bias, which no head can take"):
        fold_removed(Form.of(model))
    torch.nn.init.zeros_(model.model.norm.bias)
    form = fold_removed(Form.of(model))
    torch.testing.assert_close(form.to_model()(tokens()).logits, model(tokens()).logits)


def test_a_norm_that_is_still_there_is_named() -> None:
    model = removing(model_of("pre_ln", norm="rmsnorm"), removed=True)
    torch.nn.init.constant_(model.model.layers[1].mlp_residual.pre.std_first, 7.0)
    with pytest.raises(ConfigError, match=r"layer 1 mlp still has another constant for position 0"):
        fold_removed(Form.of(model))
    torch.nn.init.zeros_(model.model.layers[0].attn_residual.pre.removed)
    with pytest.raises(ConfigError, match="slot pre of layer 0 attention is not removed yet"):
        fold_removed(Form.of(model))
    with pytest.raises(ConfigError, match="not all norms are removed: layer 0 attention has rms"):
        fold_removed(Form.of(model_of("pre_ln", norm="rmsnorm")))


def command(module: Any, *words: object) -> None:
    assert run_command(module, "llmnorm", [str(word) for word in words]) == 0


@pytest.fixture(scope="module")
def beginning(trained: Path, data: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder from which the norms of the trained model are removed."""
    out = tmp_path_factory.mktemp("removal") / "out"
    words = ["--to", "fixed_std", "--steps", STEPS, "--data", data.path, "--out", out]
    command(convert, trained, *words)
    return out


def removal(trained: Path, beginning: Path, **changes: Any) -> dict[str, Any]:
    """Changes to a tiny run that removes the norms."""
    return {
        "model__start": str(beginning),
        "model__preset": None,
        "model__overrides": {},
        "distill__teacher": str(trained),
        "optimizer__lr": 1e-3,
        "training__max_steps": STEPS,
        "training__global_batch_size": 5,
        **changes,
    }


def test_a_run_removes_all_norms_and_its_model_leaves_as_a_llama(
    trained: Path,
    beginning: Path,
    data: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    straight, stopped = (
        load_run_config(None, tiny_words(data.path, tmp_path / name, **removal(trained, beginning)))
        for name in ("straight", "stopped")
    )
    assert train(straight) == 0
    stop_after(5, monkeypatch, Killed())
    with pytest.raises(Killed):
        train(stopped)
    train(stopped)
    assert numbers(stopped.output.dir) == numbers(straight.output.dir)
    records = metrics(straight.output.dir)
    assert abs(records[0]["train/divergence"]) < 1e-6
    assert records[-1]["train/penalty"] > 0
    total = records[-1]["train/divergence"] + records[-1]["train/penalty"]
    assert records[-1]["train/loss"] == pytest.approx(total, rel=1e-9)
    folded, llama = tmp_path / "folded", tmp_path / "llama"
    command(convert, straight.output.dir, "--to", "none", "--out", folded)
    assert "norm" not in str(AutoModelForCausalLM.from_pretrained(folded).config.residuals)
    command(export, straight.output.dir, "--target", "llama", "--out", llama)
    ids = torch.arange(60).view(2, 30)
    source = AutoModelForCausalLM.from_pretrained(straight.output.dir / "final")
    for model in (
        LlamaForCausalLM.from_pretrained(llama),
        AutoModelForCausalLM.from_pretrained(folded),
    ):
        torch.testing.assert_close(model(ids).logits, source(ids).logits, rtol=1e-4, atol=1e-4)


def test_two_ranks_remove_norms_as_one_does(
    trained: Path,
    beginning: Path,
    data: Prepared,
    tmp_path: Path,
    run_ranks: Callable[..., list[str]],
) -> None:
    changes = removal(trained, beginning, distill__weight=0.5)
    one, two = tmp_path / "one", tmp_path / "two"
    train(load_run_config(None, tiny_words(data.path, one, **changes)))
    changes["training__micro_batch_size"] = 2
    zero3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    run_ranks(PRETRAIN, *tiny_words(data.path, two, **changes), **zero3)
    for left, right in zip(metrics(one), metrics(two), strict=True):
        for key in ("train/loss", "train/divergence", "train/penalty"):
            assert right[key] == pytest.approx(left[key], rel=2e-5, abs=1e-6), (left["step"], key)


def test_a_gpt2_without_layernorms_leaves_as_a_gpt2(tmp_path: Path) -> None:
    model = model_of(
        "pre_ln",
        norm={"op": "layernorm"},
        mlp="plain",
        position="learned",
        hidden_act="gelu",
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
    )
    model = removing(model, removed=True)
    torch.nn.init.zeros_(model.model.norm.bias)
    model.float().save_pretrained(tmp_path / "removed")
    command(export, tmp_path / "removed", "--target", "gpt2", "--out", tmp_path / "gpt2")
    stock = GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")
    ids = tokens()
    torch.testing.assert_close(stock(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    written = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    assert written["layer_norm_epsilon"] == 1e12
