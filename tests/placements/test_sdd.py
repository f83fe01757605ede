"""SDD: every linear layer of a Post-LN stack is followed by a norm with its gain."""

import pytest
import torch
from schemes import SHAPE, TOLERANCE, tokens
from torch.nn.functional import linear, silu
from wiring import assert_follows, model_of, names_in_layers, norm_names, rms, rope

from llmnorm import build_config, build_model
from llmnorm.errors import ConfigError

pytestmark = pytest.mark.fast

SLOTS = (
    *(f"self_attn.{part}_norm" for part in "qkv"),
    *(f"{kind}_residual.{slot}" for kind in ("attn", "mlp") for slot in ("post", "out")),
    "mlp.gate",
    "mlp.up",
)


def attend(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    part, shape = layer.self_attn, x.shape[:2]
    q = rope(rms(part.q_norm)(linear(x, part.q_proj.weight)).view(*shape, 4, 8))
    k = rope(rms(part.k_norm)(linear(x, part.k_proj.weight)).view(*shape, 2, 8))
    v = rms(part.v_norm)(linear(x, part.v_proj.weight)).view(*shape, 2, 8)
    k, v = (t.repeat_interleave(2, dim=2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5
    weights = scores.masked_fill(torch.ones(shape[1], shape[1]).triu(1).bool(), -torch.inf)
    context = torch.einsum("bhij,bjhd->bihd", weights.softmax(-1), v).flatten(2)
    return linear(context, part.o_proj.weight)


def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    attn, feed, part = layer.attn_residual, layer.mlp_residual, layer.mlp
    x = rms(attn.out)(x + rms(attn.post)(attend(layer, x)))
    gate = silu(rms(part.gate)(linear(x, part.gate_proj.weight)))
    up = rms(part.up)(linear(x, part.up_proj.weight))
    return rms(feed.out)(x + rms(feed.post)(linear(gate * up, part.down_proj.weight)))


@pytest.mark.parametrize("depth", [1, 4])
def test_sdd_normalizes_what_each_matrix_writes(depth: int) -> None:
    assert_follows(model_of("sdd", depth=depth), block, final=False)


def test_sdd_has_a_gain_a_matrix_and_post_lns_norms() -> None:
    model = model_of("sdd")
    assert norm_names(model) == names_in_layers(4, *SLOTS, final=False)
    layer = model.model.layers[0]
    assert layer.self_attn.k_norm.weight.shape == (16,)  # all features, not a head's
    assert layer.mlp.gate.weight.shape == (SHAPE["intermediate_size"],)


def test_the_length_of_any_matrix_means_nothing() -> None:
    one, other = (model_of("sdd", norm={"op": "rmsnorm", "eps": 1e-12}) for _ in range(2))
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if name.endswith("_proj.weight"):
                weight *= 3.0
    wanted, found = one(tokens()).logits, other(tokens()).logits
    torch.testing.assert_close(found, wanted, **TOLERANCE[torch.float64])


def test_gains_start_at_1_and_those_of_o_and_down_at_the_root_of_the_depth() -> None:
    model = build_model(build_config(SHAPE, placement="sdd"))
    layer = model.model.layers[1]
    for norm in (layer.attn_residual.post, layer.mlp_residual.post):
        assert norm.weight.tolist() == [0.5] * 32
    for norm in (layer.self_attn.q_norm, layer.mlp.up, layer.mlp_residual.out):
        assert set(norm.weight.tolist()) == {1.0}


def test_every_matrix_of_a_block_starts_at_the_papers_std() -> None:
    model = build_model(build_config(SHAPE, placement="sdd", hidden_size=128))
    for name in ("q_proj", "o_proj"):
        std = getattr(model.model.layers[3].self_attn, name).weight.std().item()
        assert std == pytest.approx((2.5 * 128) ** -0.5, rel=0.03)
    std = model.model.layers[3].mlp.down_proj.weight.std().item()
    assert std == pytest.approx((2.5 * 128) ** -0.5, rel=0.05)


def test_sdd_is_defined_for_rmsnorm() -> None:
    with pytest.raises(ConfigError, match="placement sdd is defined for norm rmsnorm; saw dyt"):
        build_config(SHAPE, placement="sdd", norm="dyt")
