"""HybridNorm*: HybridNorm whose first layer is Pre-LN (Zhuo et al. 2025)."""

import pytest
import torch
from schemes import SHAPE
from wiring import assert_follows, attention, mlp, model_of, norm_names, rms, same

from llmnorm import build_config, build_model
from llmnorm.errors import ConfigError

pytestmark = pytest.mark.fast


def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    part, attn, feed = layer.self_attn, layer.attn_residual, layer.mlp_residual
    write = attention(layer, q=rms(part.q_norm), k=rms(part.k_norm), v=rms(part.v_norm))
    post = rms(attn.post) if hasattr(attn.post, "weight") else same
    if number == 1:
        x = x + post(write(rms(attn.pre)(x)))
        return x + mlp(layer)(rms(feed.pre)(x))
    x = x + post(write(x))
    s = rms(feed.entry)(x)
    return s + mlp(layer)(s)


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_only_the_first_layer_is_pre_ln_with_its_norms_on_q_k_and_v_kept(
    depth: int, post: bool
) -> None:
    assert_follows(model_of({"name": "hybrid_norm_star", "post": post}, depth=depth), block)


def test_beyond_hybrid_norm_it_has_one_norm_more_on_the_first_attention() -> None:
    star, hybrid = norm_names(model_of("hybrid_norm_star")), norm_names(model_of("hybrid_norm"))
    assert star - hybrid == {
        "layers.0.attn_residual.pre.weight",
        "layers.0.mlp_residual.pre.weight",
    }
    assert hybrid - star == {"layers.0.mlp_residual.entry.weight"}


def test_the_norm_on_attentions_output_starts_at_a_gain_of_one_over_root_2l() -> None:
    placement = {"name": "hybrid_norm_star", "post": True}
    model = build_model(build_config(SHAPE, placement=placement))
    for layer in model.model.layers:
        gain = layer.attn_residual.post.weight
        torch.testing.assert_close(gain, torch.full((32,), 8**-0.5))
        assert type(layer.mlp_residual.post) is torch.nn.Identity


def test_post_is_refused_for_a_norm_without_an_initial_gain() -> None:
    placement = {"name": "hybrid_norm_star", "post": True}
    with pytest.raises(ConfigError, match="dyt has no option 'weight_init'"):
        build_config(SHAPE, placement=placement, norm="dyt")
