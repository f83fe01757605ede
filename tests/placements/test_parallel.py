"""The parallel block: y = x + A(N(x)) + F(N(x)) (GPT-J, PaLM)."""

import pytest
import torch
from schemes import SHAPE, tokens
from wiring import assert_follows, attention, mlp, model_of, names_in_layers, norm_names, rms

from llmnorm import build_config, build_model

pytestmark = pytest.mark.fast


def shared_block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = rms(layer.attn_residual.pre)(x)
    return x + attention(layer)(h) + mlp(layer)(h)


def separate_block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    write = attention(layer)(rms(layer.attn_residual.pre)(x))
    return x + write + mlp(layer)(rms(layer.mlp_residual.pre)(x))


@pytest.mark.parametrize("depth", [1, 4])
def test_attention_and_mlp_read_one_normalized_block_input(depth: int) -> None:
    model = model_of("parallel", depth=depth)
    assert_follows(model, shared_block)
    assert norm_names(model) == names_in_layers(depth, "attn_residual.pre")


@pytest.mark.parametrize("depth", [1, 4])
def test_each_may_have_its_own_norm(depth: int) -> None:
    model = model_of({"name": "parallel", "shared_norm": False}, depth=depth)
    assert_follows(model, separate_block)
    assert norm_names(model) == names_in_layers(depth, "attn_residual.pre", "mlp_residual.pre")


def test_the_shared_norm_gets_the_gradients_of_both_sublayers() -> None:
    shared, apart = model_of("parallel"), model_of({"name": "parallel", "shared_norm": False})
    weights = dict(shared.state_dict())
    for i in range(4):
        norm = weights[f"model.layers.{i}.attn_residual.pre.weight"]
        weights[f"model.layers.{i}.mlp_residual.pre.weight"] = norm
    apart.load_state_dict(weights)
    for model in (shared, apart):
        model(tokens(), labels=tokens()).loss.backward()
    for one, two in zip(shared.model.layers, apart.model.layers, strict=True):
        both = two.attn_residual.pre.weight.grad + two.mlp_residual.pre.weight.grad
        torch.testing.assert_close(one.attn_residual.pre.weight.grad, both)


def test_a_shared_norm_has_attentions_options() -> None:
    """DyT's alpha at width 4096 is 0.8 for attention, 0.2 for the mlp."""
    wide = SHAPE | {"hidden_size": 4096, "num_hidden_layers": 1}
    for shared, alpha in ((True, 0.8), (False, 0.2)):
        placement = {"name": "parallel", "shared_norm": shared}
        [layer] = build_config(wide, norm="dyt", placement=placement).residuals
        assert layer["attn"]["pre"]["alpha"] == pytest.approx(0.8)
        assert layer["mlp"]["pre"]["alpha"] == pytest.approx(alpha)


def test_one_alpha_for_both_is_shared() -> None:
    model = build_model(build_config(SHAPE, norm="dyt", placement="parallel"))
    assert "layers.0.mlp_residual.pre.alpha" not in norm_names(model)
    assert torch.isfinite(model(tokens()).logits).all()
