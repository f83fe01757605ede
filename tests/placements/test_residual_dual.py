"""ResiDual: p = N(p + f), r = r + s f, and p + N'(r) at the end (Xie et al. 2023)."""

from typing import Any

import pytest
import torch
from schemes import SHAPE, TOLERANCE, tokens
from torch import nn
from wiring import (
    TwoStreamBlock,
    assert_two_streams_follow,
    attention,
    copy_weights,
    mlp,
    model_of,
    names_in_layers,
    norm_names,
    rms,
)

from llmnorm import build_config
from llmnorm.errors import ConfigError

pytestmark = pytest.mark.fast


def block_at(scale: float) -> TwoStreamBlock:
    def block(
        number: int, layer: nn.Module, p: torch.Tensor, r: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        f = attention(layer)(p)
        p, r = rms(layer.attn_residual.out)(p + f), r + scale * f
        f = mlp(layer)(p)
        return rms(layer.mlp_residual.out)(p + f), r + scale * f

    return block


def last_norm(model: nn.Module, r: torch.Tensor) -> torch.Tensor:
    """The norm of the second stream, whose eps is 1e-7."""
    rms_of_r = torch.sqrt(r.square().mean(-1, keepdim=True) + 1e-7)
    return r / rms_of_r * model.model.streams.second.weight


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize(("scale", "alpha"), [(1.0, 1.0), (0.1, 1.0), (1.0, 0.5)])
def test_residual_dual_adds_the_branch_to_a_post_ln_and_a_raw_stream(
    depth: int, scale: float, alpha: float
) -> None:
    placement = {"name": "residual_dual", "scale": scale, "alpha": alpha}
    assert_two_streams_follow(
        model_of(placement, depth=depth),
        block_at(scale),
        lambda model, p, r: alpha * p + last_norm(model, r),
        scale=scale,
    )


def test_residual_dual_has_post_lns_norms_and_one_for_the_second_stream_but_no_final_one() -> None:
    model = model_of("residual_dual")
    slots = names_in_layers(4, "attn_residual.out", "mlp_residual.out", final=False)
    assert norm_names(model) == slots | {"streams.second.weight"}
    assert type(model.model.norm) is nn.Identity


@torch.no_grad()
def test_its_first_stream_is_post_ln() -> None:
    dual = model_of({"name": "residual_dual", "scale": 0.5})
    post = model_of("post_ln")
    weights = {n: v for n, v in dual.state_dict().items() if "streams" not in n}
    post.load_state_dict(weights)
    states: list[torch.Tensor] = []
    dual.model.layers[-1].register_forward_hook(lambda module, given, state: states.append(state))
    dual(tokens())
    torch.testing.assert_close(
        states[0][0], post.model(tokens()).last_hidden_state, **TOLERANCE[torch.float64]
    )


@torch.no_grad()
def test_the_scale_cancels_in_the_last_norm_up_to_eps() -> None:
    whole, tenth = (model_of({"name": "residual_dual", "scale": s}) for s in (1.0, 0.1))
    copy_weights(whole, tenth)
    ours, theirs = whole(tokens()).logits, tenth(tokens()).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("norm", "eps"),
    [
        ("rmsnorm", 1e-7),
        ({"op": "layernorm", "eps": 1e-5}, 1e-7),
        ({"op": "rmsnorm", "eps": 1e-9}, 1e-9),
        ("dyt", None),
    ],
)
def test_the_last_norm_has_an_eps_of_its_own_unless_it_is_smaller(
    norm: Any, eps: float | None
) -> None:
    config = build_config(SHAPE, norm=norm, placement="residual_dual")
    assert config.streams["second"].get("eps") == eps
    assert config.residuals[0]["attn"]["out"].get("eps") != 1e-7


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_that_is_not_above_zero_is_refused(scale: float) -> None:
    with pytest.raises(ConfigError, match=r"residual_dual\.scale is -?\d\.0; expected a number"):
        build_config(SHAPE, placement={"name": "residual_dual", "scale": scale})


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no option 'dec_alpha'; its options: scale, alpha"):
        build_config(SHAPE, placement={"name": "residual_dual", "dec_alpha": 0.5})
