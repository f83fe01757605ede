"""Admin: Post-LN with skips that start as large as the branches before them add (Liu et al.)."""

import math
from pathlib import Path

import pytest
import torch
from schemes import SHAPE, tokens
from transformers import AutoModelForCausalLM
from wiring import assert_follows, attention, mlp, model_of, names_in_layers, norm_names, rms

from llmnorm import LlmNormForCausalLM, build_config, build_model, self_test
from llmnorm.calibration import calibrated
from llmnorm.errors import CheckpointError, SelfTestError
from llmnorm.training.weights import load_weights

pytestmark = pytest.mark.fast

LARGE = {"placement": "admin", "initializer_range": 0.2}  # so that branches add something
SLOTS = ("attn_residual.skip", "attn_residual.out", "mlp_residual.skip", "mlp_residual.out")


def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    attn, feed = layer.attn_residual, layer.mlp_residual
    x = rms(attn.out)(attn.skip.weight * x + attention(layer)(x))
    return rms(feed.out)(feed.skip.weight * x + mlp(layer)(x))


def starts(model: LlmNormForCausalLM) -> list[float]:
    residuals = model.config.residuals
    return [layer[kind]["skip"]["value"] for layer in residuals for kind in ("attn", "mlp")]


@pytest.mark.parametrize("depth", [1, 4])
def test_admin_multiplies_each_feature_of_the_skip_of_post_ln(depth: int) -> None:
    assert_follows(model_of("admin", depth=depth), block, final=False)


def test_admin_adds_one_vector_a_skip_to_post_ln() -> None:
    model = model_of("admin")
    assert norm_names(model) == names_in_layers(4, *SLOTS, final=False)
    assert model.model.layers[0].attn_residual.skip.weight.shape == (32,)


@torch.no_grad()
def test_each_skip_starts_at_the_root_of_what_the_branches_before_it_add_in_post_ln() -> None:
    admin = build_model(build_config(SHAPE, **LARGE), seed=4)
    post = build_model(build_config(SHAPE, **LARGE | {"placement": "post_ln"}), seed=0)
    ids = torch.randint(97, (8, 64), generator=torch.Generator().manual_seed(0))
    x, total, wanted = post.double().model.embed_tokens(ids), 1.0, []
    for layer in post.model.layers:
        for residual, branch in (
            (layer.attn_residual, attention(layer)),
            (layer.mlp_residual, mlp(layer)),
        ):
            wanted.append(math.sqrt(total))
            f = branch(x)
            total += f.var(correction=0).item()
            x = rms(residual.out)(x + f)
    assert starts(admin) == pytest.approx(wanted, rel=1e-3)
    assert wanted[0] == 1.0
    assert wanted[-1] > 1.5
    for layer, (attn, feed) in zip(
        admin.model.layers, zip(wanted[::2], wanted[1::2], strict=True), strict=True
    ):
        for residual, value in ((layer.attn_residual, attn), (layer.mlp_residual, feed)):
            assert residual.skip.weight.tolist() == pytest.approx([value] * 32, rel=1e-3)


def test_the_starts_belong_to_the_scheme_and_not_to_a_seed() -> None:
    config = build_config(SHAPE, **LARGE)
    one, other = (build_model(config, seed=seed) for seed in (0, 7))
    assert starts(one) == starts(other)
    assert starts(one) == [float(f"{value:.4g}") for value in starts(one)]
    assert config.residuals[0]["attn"]["skip"]["value"] == 0.0  # the given config stays
    assert calibrated(one.config) is one.config


def test_a_model_made_without_measuring_is_refused_where_its_weights_are_drawn() -> None:
    """Not Post-LN in disguise, and no NaN later."""
    config = build_config(SHAPE, **LARGE)
    for make in (LlmNormForCausalLM, AutoModelForCausalLM.from_config):
        with pytest.raises(ValueError, match=r"no value to start from; llmnorm\.build_model"):
            make(config)
    with torch.device("meta"):
        empty = LlmNormForCausalLM(config)  # to count its parameters, say
    empty.to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"no value to start from"):
        empty.init_weights()


@pytest.mark.parametrize("weights", ["loaded", "drawn"])
def test_a_measured_config_makes_models_anywhere(weights: str, tmp_path: Path) -> None:
    model = build_model(build_config(SHAPE, **LARGE))
    if weights == "loaded":
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
    else:
        again = AutoModelForCausalLM.from_config(model.config)
    self_test(again, fresh=True)
    assert again(tokens(), labels=tokens()).loss.isfinite()


def test_only_the_trunk_is_run_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build_config(SHAPE, **LARGE)
    wanted = starts(build_model(config))
    monkeypatch.setattr(LlmNormForCausalLM, "__init__", lambda *_: pytest.fail("a head was made"))
    measured = calibrated(config).residuals
    assert [
        layer[kind]["skip"]["value"] for layer in measured for kind in ("attn", "mlp")
    ] == wanted


def test_a_start_of_another_size_is_named() -> None:
    model = build_model(build_config(SHAPE, **LARGE))
    with torch.no_grad():
        model.model.layers[2].mlp_residual.skip.weight.fill_(1.0)
    with pytest.raises(SelfTestError, match=r"layers\.2\.mlp_residual\.skip\.weight starts at 1"):
        self_test(model, fresh=True)


def test_schemes_without_measured_starts_keep_their_very_config() -> None:
    config = build_config(SHAPE, placement="deepnorm")
    assert calibrated(config) is config
    assert build_model(config).config is config


def test_a_saved_model_carries_its_starts(tmp_path: Path) -> None:
    model = build_model(build_config(SHAPE, **LARGE))
    model.save_pretrained(tmp_path)
    loaded = LlmNormForCausalLM.from_pretrained(tmp_path)
    assert starts(loaded) == starts(model)
    self_test(loaded, fresh=True)
    assert torch.equal(loaded(tokens()).logits, model.eval()(tokens()).logits)


def test_a_run_of_another_seed_may_start_from_its_weights(tmp_path: Path) -> None:
    """Starts measured on each seed's own weights would make it another scheme."""
    config = build_config(SHAPE, **LARGE)
    first, second = build_model(config, seed=0), build_model(config, seed=1)
    first.save_pretrained(tmp_path)
    load_weights(second, tmp_path)
    assert torch.equal(second.lm_head.weight, first.lm_head.weight)


def test_measured_starts_are_no_part_of_the_wiring_that_weights_must_fit(tmp_path: Path) -> None:
    """They depend on the init, which trained weights have left behind."""
    first = build_model(build_config(SHAPE, **LARGE))
    second = build_model(build_config(SHAPE, placement="admin", initializer_range=0.1))
    assert starts(first) != starts(second)
    first.save_pretrained(tmp_path)
    load_weights(second, tmp_path)
    skips = [model.model.layers[3].mlp_residual.skip.weight for model in (first, second)]
    assert torch.equal(*skips)
    post_ln = build_model(build_config(SHAPE, placement="post_ln"))
    with pytest.raises(CheckpointError, match=r"residuals\.0\.attn\.skip"):
        load_weights(post_ln, tmp_path)
