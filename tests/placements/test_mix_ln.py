"""Mix-LN: Post-LN in the first floor(a L) layers, Pre-LN after them (Li et al. 2025)."""

import pytest
import torch
from schemes import tokens
from wiring import assert_follows, attention, copy_weights, mlp, model_of, rms

from llmnorm import build_config, build_model
from llmnorm.errors import ConfigError
from llmnorm.modeling.residual import NormSpec
from llmnorm.placements import Site, parse_placement

pytestmark = pytest.mark.fast


def post_layers(fraction: float, depth: int) -> int:
    """How many layers the rule makes Post-LN; asserts that they come first."""
    rule = parse_placement({"name": "mix_ln", "fraction": fraction})
    norm = NormSpec.parse("rmsnorm")
    is_post = []
    for layer_idx in range(depth):
        kinds = {
            frozenset(
                rule.residual(
                    Site(
                        kind=kind,
                        layer_idx=layer_idx,
                        depth=depth,
                        num_attention_heads=4,
                        hidden_size=32,
                    ),
                    norm,
                ).slots()
            )
            for kind in ("attn", "mlp")
        }
        assert kinds in ({frozenset({"out"})}, {frozenset({"pre"})})  # both sublayers alike
        is_post.append(kinds == {frozenset({"out"})})
    assert is_post == sorted(is_post, reverse=True)
    return sum(is_post)


@pytest.mark.parametrize(
    ("fraction", "depth", "count"),
    [
        (0.25, 12, 3),  # the paper's 12 and 24 layers
        (0.25, 24, 6),
        (0.0625, 32, 2),  # its 7B run
        (0.25, 1, 0),
        (0.25, 3, 0),
        (0.25, 4, 1),
        (0.25, 7, 1),
        (0.25, 8, 2),
        (0.5, 5, 2),
        (0.0, 6, 0),
        (1.0, 6, 6),
        (1 / 3, 24, 8),
        (0.1, 30, 3),
        (0.7, 10, 7),
    ],
)
def test_mix_ln_switches_after_floor_of_fraction_times_depth_layers(
    fraction: float, depth: int, count: int
) -> None:
    assert post_layers(fraction, depth) == count


@pytest.mark.parametrize(("fraction", "depth", "count"), [(0.58, 50, 29), (0.29, 100, 29)])
def test_a_whole_number_of_layers_is_not_lost_to_rounding(
    fraction: float, depth: int, count: int
) -> None:
    assert post_layers(fraction, depth) == count


@pytest.mark.parametrize("depth", [3, 4, 6])
@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_mix_ln_is_post_ln_then_pre_ln_with_nothing_in_between(depth: int, fraction: float) -> None:
    def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        attn, feed = layer.attn_residual, layer.mlp_residual
        if number <= int(fraction * depth):
            x = rms(attn.out)(x + attention(layer)(x))
            return rms(feed.out)(x + mlp(layer)(x))
        x = x + attention(layer)(rms(attn.pre)(x))
        return x + mlp(layer)(rms(feed.pre)(x))

    assert_follows(model_of({"name": "mix_ln", "fraction": fraction}, depth=depth), block)


def test_mix_ln_with_fraction_0_is_pre_ln_bit_for_bit() -> None:
    mix = model_of({"name": "mix_ln", "fraction": 0.0})
    pre = model_of("pre_ln")
    copy_weights(mix, pre)
    assert torch.equal(mix(tokens()).logits, pre(tokens()).logits)
    fresh = [
        build_model(build_config("debug", placement=placement)).state_dict()
        for placement in ({"name": "mix_ln", "fraction": 0}, "pre_ln")
    ]
    assert fresh[0].keys() == fresh[1].keys()
    assert all(torch.equal(fresh[0][name], fresh[1][name]) for name in fresh[0])


def test_mix_ln_with_fraction_1_is_post_ln_and_a_final_norm() -> None:
    mix = model_of({"name": "mix_ln", "fraction": 1.0})
    post = model_of("post_ln")
    weights = dict(mix.state_dict())
    final = weights.pop("model.norm.weight")
    post.load_state_dict(weights)
    x = post.model(tokens()).last_hidden_state
    wanted = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * final
    torch.testing.assert_close(mix.model(tokens()).last_hidden_state, wanted)


def test_a_quarter_of_the_layers_is_the_default() -> None:
    assert build_config("debug", placement="mix_ln").placement == {
        "name": "mix_ln",
        "fraction": 0.25,
    }


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_a_fraction_outside_0_to_1_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"mix_ln.fraction is .*; expected"):
        build_config("debug", placement={"name": "mix_ln", "fraction": fraction})


def test_an_unknown_option_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no option 'fractoin'; its options: fraction"):
        build_config("debug", placement={"name": "mix_ln", "fractoin": 0.5})


@pytest.mark.parametrize("fraction", ["0.5", True, None])
def test_a_fraction_that_is_no_number_is_refused_by_name(fraction: object) -> None:
    with pytest.raises(ConfigError, match=r"mix_ln\.fraction"):
        build_config("debug", placement={"name": "mix_ln", "fraction": fraction})
