"""SiameseNorm: f = F(N(p + N'(r))), r = r + f and p = N''(p + f/c) (arXiv:2602.08064)."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from schemes import SHAPE, TOLERANCE
from torch import nn
from wiring import (
    TwoStreamBlock,
    assert_two_streams_follow,
    attention,
    mlp,
    model_of,
    names_in_layers,
    norm_names,
    rms,
)

from llmnorm import LlmNormConfig, build_config, build_model
from llmnorm.errors import ConfigError

pytestmark = pytest.mark.fast

Pair = tuple[torch.Tensor, torch.Tensor]
QKV = ("self_attn.q_norm", "self_attn.k_norm", "self_attn.v_norm")


def siamese(variant: str, **options: Any) -> dict[str, Any]:
    return {"name": "siamese_norm", "variant": variant, **options}


def post_pre_at(damping: float) -> TwoStreamBlock:
    def block(number: int, layer: nn.Module, p: torch.Tensor, r: torch.Tensor) -> Pair:
        c = (damping * number) ** 0.5
        for slots, branch in (
            (layer.attn_residual, attention(layer)),
            (layer.mlp_residual, mlp(layer)),
        ):
            f = branch(rms(slots.pre)(p + rms(slots.second)(r)))
            p, r = rms(slots.out)(p + f / c), r + f
        return p, r

    return block


def hybrid_at(damping: float, *, star: bool) -> TwoStreamBlock:
    def block(number: int, layer: nn.Module, p: torch.Tensor, r: torch.Tensor) -> Pair:
        first_of_star = star and number == 1
        c = (damping * number) ** 0.5
        slots, part = layer.attn_residual, layer.self_attn
        read = rms(slots.first)(p) if first_of_star else slots.first.weight * p
        attend = attention(layer, q=rms(part.q_norm), k=rms(part.k_norm), v=rms(part.v_norm))
        f = attend(read + rms(slots.second)(r))
        p, r = p + f / c, r + f
        slots = layer.mlp_residual
        s = rms(slots.first if first_of_star else slots.entry)(p)
        f = mlp(layer)(rms(slots.pre)(s + rms(slots.second)(r)))
        return (p if first_of_star else s) + f / c, r + f

    return block


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("damping", [1.0, 2.0])
def test_post_pre_follows_algorithm_1(depth: int, damping: float) -> None:
    model = model_of(siamese("post_pre", damping=damping), depth=depth)
    close = lambda model, p, r: p + rms(model.model.streams.second)(r)  # noqa: E731
    assert_two_streams_follow(model, post_pre_at(damping), close)


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("star", [False, True])
def test_hybrid_follows_the_language_model(depth: int, star: bool) -> None:
    model = model_of(siamese("hybrid", damping=2.0, star=star), depth=depth)

    def close(model: nn.Module, p: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        streams = model.model.streams
        return rms(streams.first)(p) + rms(streams.second)(r)

    assert_two_streams_follow(model, hybrid_at(2.0, star=star), close)


def test_post_pre_has_three_norms_a_sublayer_one_at_the_end_and_no_final_one() -> None:
    slots = [f"{kind}_residual.{slot}" for kind in ("attn", "mlp") for slot in ("pre", "second")]
    slots += ["attn_residual.out", "mlp_residual.out"]
    names = names_in_layers(4, *slots, final=False) | {"streams.second.weight"}
    assert norm_names(model_of("siamese_norm")) == names


def test_hybrid_has_a_gain_for_attentions_norm_and_one_norm_more_at_the_end() -> None:
    slots = ("attn_residual.first", "attn_residual.second", *QKV)
    slots += tuple(f"mlp_residual.{slot}" for slot in ("entry", "pre", "second"))
    ends = {"streams.first.weight", "streams.second.weight"}
    model = build_model(build_config(SHAPE, placement=siamese("hybrid")))
    assert norm_names(model) == names_in_layers(4, *slots) | ends
    gain = model.model.layers[2].attn_residual.first
    assert type(gain).__name__ == "Gain"
    assert gain.weight.tolist() == [1.0] * 32


def test_star_changes_the_first_layer_alone() -> None:
    plain, star = (
        build_config(SHAPE, placement=siamese("hybrid", star=on)) for on in (False, True)
    )
    assert plain.residuals[1:] == star.residuals[1:]
    assert star.residuals[0]["attn"]["first"]["op"] == "rmsnorm"
    assert "entry" not in star.residuals[0]["mlp"]


@pytest.mark.parametrize(
    ("damping", "divisors"),
    [(1.0, [1.0, 1.4142, 1.7321, 2.0]), (2.0, [1.4142, 2.0, 2.4495, 2.8284])],
)
@pytest.mark.parametrize("variant", ["post_pre", "hybrid"])
def test_both_sublayers_of_layer_l_are_divided_by_sqrt_damping_l(
    variant: str, damping: float, divisors: list[float]
) -> None:
    config = build_config(SHAPE, placement=siamese(variant, damping=damping))
    for kind in ("attn", "mlp"):
        found = [1 / layer[kind]["post"]["value"] for layer in config.residuals]
        assert found == pytest.approx(divisors, rel=1e-4)


@torch.no_grad()
def test_the_norm_after_a_sublayer_may_as_well_stand_before_the_next() -> None:
    """The code for vision has it so; the two differ at the ends alone."""
    after = model_of("siamese_norm", depth=2)
    config = LlmNormConfig.from_dict(after.config.to_dict() | {"norm": None, "placement": None})
    for layer in config.residuals:
        for slots in layer.values():
            slots["entry"] = slots.pop("out")
    sublayers = [(i, kind) for i in range(2) for kind in ("attn", "mlp")]
    del config.residuals[0]["attn"]["entry"]
    before = build_model(config).double()
    weights = after.state_dict()
    name = "model.layers.{}.{}_residual.{}.weight"
    for this, following in pairwise(sublayers):
        weights[name.format(*following, "entry")] = weights.pop(name.format(*this, "out"))
    last = rms(after.model.layers[1].mlp_residual.out)
    del weights[name.format(1, "mlp", "out")]
    before.load_state_dict(weights)
    ids, ends = torch.arange(9)[None], []
    for model in (before, after):
        ends.append([])
        model.model.layers[-1].register_forward_hook(
            lambda module, given, state, kept=ends[-1]: kept.append(state)
        )
        model(ids)
    (p, r), (wanted_p, wanted_r) = ends[0][0], ends[1][0]
    torch.testing.assert_close(last(p), wanted_p, **TOLERANCE[torch.float64])
    torch.testing.assert_close(r, wanted_r, **TOLERANCE[torch.float64])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "pre"}, r"siamese_norm\.variant is 'pre'; expected post_pre or hybrid"),
        ({"damping": 0.0}, r"siamese_norm\.damping is 0\.0; expected a number above 0"),
        ({"star": True}, r"siamese_norm\.star is for variant hybrid alone"),
        ({"c": 2.0}, "no option 'c'; its options: variant, damping, star"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(SHAPE, placement={"name": "siamese_norm", **options})
