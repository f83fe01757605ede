"""Fixup: scalar biases and a scalar gain instead of norms, last matrix of a branch 0."""

import pytest
import torch
from schemes import SHAPE, TOLERANCE, tokens
from torch.nn.functional import gelu, linear, silu
from wiring import assert_follows, attention, model_of, norm_names

from llmnorm import build_config, build_model
from llmnorm.errors import ConfigError

pytestmark = pytest.mark.fast


def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    attn, feed, part = layer.attn_residual, layer.mlp_residual, layer.mlp
    attend = attention(layer, lambda context: context + layer.self_attn.inner.bias)
    x = x + attn.post.weight * attend(x + attn.pre.bias)
    s = x + feed.pre.bias
    up = linear(s, part.up_proj.weight) + part.up.bias
    gate = silu(linear(s, part.gate_proj.weight) + part.gate.bias)
    return x + feed.post.weight * linear(gate * up + part.inner.bias, part.down_proj.weight)


@pytest.mark.parametrize("depth", [1, 4])
def test_fixup_has_a_bias_before_each_linear_layer_and_nonlinearity(depth: int) -> None:
    assert_follows(model_of("fixup", depth=depth), block)


def test_a_plain_mlp_has_its_bias_before_the_activation() -> None:
    model = model_of("fixup", depth=1, mlp="plain", hidden_act="gelu")
    part = model.model.layers[0].mlp
    x = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inner = gelu(linear(x, part.up_proj.weight) + part.up.bias) + part.inner.bias
    wanted = linear(inner, part.down_proj.weight)
    torch.testing.assert_close(part(x), wanted, **TOLERANCE[torch.float64])
    assert not hasattr(part, "gate")


def test_fixups_extra_parameters_are_single_numbers() -> None:
    model = build_model(build_config(SHAPE, placement="fixup", norm="none"))
    parameters = dict(model.model.named_parameters())
    extra = norm_names(model)
    assert len(extra) == 4 * (3 + 5)
    assert {tuple(parameters[name].shape) for name in extra} == {(1,)}
    starts = {name.rpartition(".")[2]: parameters[name].item() for name in extra}
    assert starts == {"weight": 1.0, "bias": 0.0}


def test_fixups_matrices_start_at_0_at_the_end_and_damped_inside() -> None:
    """n branches of two matrices: n^(-1/2) inside, n = 2 L."""
    model = build_model(build_config(SHAPE, placement="fixup", hidden_size=128))
    layer = model.model.layers[2]
    assert not layer.self_attn.o_proj.weight.any()
    assert not layer.mlp.down_proj.weight.any()
    for matrix in (layer.self_attn.v_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
        assert matrix.weight.std().item() == pytest.approx(0.02 * 8**-0.5, rel=0.05)
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_every_block_starts_as_the_identity_and_learns() -> None:
    model = build_model(build_config(SHAPE, placement="fixup"))
    outputs = model(tokens(), labels=tokens(), output_hidden_states=True)
    first, *_, last, _ = outputs.hidden_states
    assert torch.equal(first, last)
    outputs.loss.backward()
    layer = model.model.layers[0]
    assert layer.self_attn.o_proj.weight.grad.any()
    assert layer.mlp.down_proj.weight.grad.any()


@pytest.mark.parametrize("weights", ["weight_norm", "project"])
def test_weights_that_need_a_length_refuse_a_start_at_0(weights: str) -> None:
    with pytest.raises(ConfigError, match=r"init 'fixup' starts model\.layers\.0\..* at 0"):
        build_config(SHAPE, placement="fixup", weights=weights)
