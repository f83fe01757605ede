"""muP: factors by width and depth, and the coordinate check that they are there for."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from schemes import SHAPE

from llmnorm import build_config, build_model
from llmnorm.errors import ConfigError
from llmnorm.modeling.parametrization import Factors, Parametrization
from llmnorm.training.optimizer import make_optimizer, parameter_groups

MUP = {"name": "mup", "base_width": 32}
HEAD_DIM, VOCABULARY = 16, 61


def _settings(name: str = "adamw", **options: Any) -> Any:
    return SimpleNamespace(
        name=name, lr=0.01, weight_decay=0.1, betas=[0.9, 0.95], eps=1e-8, options=options
    )


def _shape(width: int, depth: int) -> dict[str, int]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": width // HEAD_DIM,
    }


def _change(width: int, depth: int = 2, *, settings: Any = None, **scheme: Any) -> torch.Tensor:
    """RMS of what three steps change in the stream after the last block, and in the logits."""
    model = build_model(build_config(_shape(width, depth), **scheme))
    optimizer = make_optimizer(model, settings or _settings())
    ids = torch.randint(VOCABULARY, (4, 17), generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    last = model.model.layers[-1]
    for _ in range(4):
        handle = last.register_forward_hook(lambda *found: seen.append(found[-1].detach()))
        outputs = model(ids, labels=ids)
        handle.remove()
        seen.append(outputs.logits.detach())
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changes = [after - before for before, after in zip(seen[:2], seen[-2:], strict=True)]
    return torch.stack([change.square().mean().sqrt() for change in changes])


def _growth(changes: list[torch.Tensor]) -> tuple[float, float]:
    """Change in the largest model divided by that in the smallest: of the stream, the logits."""
    hidden, logits = (changes[-1] / changes[0]).tolist()
    return hidden, logits


WIDTHS = (32, 64, 128, 256)


@pytest.mark.parametrize(
    "settings",
    [_settings(), _settings("muon"), _settings("muon", adjust_lr_fn="original")],
    ids=["adamw", "muon", "muon_original"],
)
def test_steps_change_the_features_alike_at_every_width_under_mup_alone(settings: Any) -> None:
    """The coordinate check of Tensor Programs V: 8 times the width, features within 1.25."""
    mup = [_change(width, parametrization=MUP, settings=settings) for width in WIDTHS]
    hidden, logits = _growth(mup)
    assert 1 / 1.25 < hidden < 1.25
    assert 1 / 1.8 < logits < 1.8  # the initial logits, which shrink as the root of the width
    for one, other in pairwise(mup):
        assert (other / one).max() < 1.1
    standard = [_change(width, settings=settings) for width in (WIDTHS[0], WIDTHS[-1])]
    hidden, logits = _growth(standard)
    assert hidden > 2.5
    assert logits > 3


def _completep(alpha: float) -> dict[str, Any]:
    placement = {"name": "completep", "base_width": 32, "base_depth": 2, "alpha": alpha}
    return {"placement": placement}


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_steps_change_the_stream_alike_at_every_depth_under_completep_alone(alpha: float) -> None:
    """8 times the depth, changes within 1.25."""
    changes = [_change(32, depth, **_completep(alpha)) for depth in (4, 8, 32)]
    assert all(1 / 1.25 < growth < 1.25 for growth in _growth(changes))
    for scheme in ({}, {"parametrization": MUP}):
        hidden, _ = _growth([_change(32, depth, **scheme) for depth in (4, 32)])
        assert hidden > 5


# --- the rules --------------------------------------------------------------------------------


@pytest.mark.fast
def test_the_factors_are_those_of_the_papers_table() -> None:
    """m_d = 4, m_L = 8."""
    spec = Parametrization.parse({"name": "mup", "base_width": 32, "base_depth": 2, "alpha": 0.5})
    root = 8**-0.5
    matrix = spec.factors(128, 16, matrix=True)
    assert (matrix.lr, matrix.weight_decay, matrix.eps) == pytest.approx(
        (root / 4, 4.0, root / 4), rel=1e-12
    )
    assert spec.factors(128, 16, matrix=False) == Factors(lr=root)
    full = Parametrization.parse({"name": "mup", "base_width": 32, "base_depth": 2})
    assert full.factors(128, 16, matrix=True) == Factors(lr=1 / 4, weight_decay=4, eps=1 / 32)
    assert full.factors(128, 16, matrix=False) == Factors()
    no_depth = Parametrization.parse(MUP)
    assert no_depth.factors(128, 16, matrix=True) == Factors(lr=1 / 4, weight_decay=4, eps=1 / 4)
    assert Parametrization.parse("standard").factors(128, 16, matrix=True) == Factors()


@pytest.mark.fast
def test_muons_matrices_take_the_root_of_the_width_or_nothing() -> None:
    spec = Parametrization.parse(MUP)
    assert spec.factors(128, 4, matrix=True, spectral=0.5) == Factors(lr=0.5, weight_decay=2)
    assert spec.factors(128, 4, matrix=True, spectral=0.0) == Factors()
    model = build_model(build_config(_shape(128, 2), parametrization=MUP))
    for options, lr in (({}, 0.5), ({"adjust_lr_fn": "original"}, 1.0)):
        hidden, *rest = parameter_groups(model, _settings("muon", **options))
        assert (hidden.branch, hidden.lr_factor, hidden.eps_factor) == ("muon", lr, 1.0)
        assert {group.lr_factor for group in rest} == {1.0}


@pytest.mark.fast
def test_mup_divides_logits_by_the_width_ratio_and_scores_by_head_dim() -> None:
    config = build_config(_shape(128, 2), parametrization=MUP)
    assert config.logits == {"op": "constant", "value": 0.25}
    q = config.residuals[1]["attn"]["q"]
    assert q == {"op": "constant", "value": pytest.approx(HEAD_DIM**-0.5)}
    normed = build_config(_shape(128, 2), parametrization=MUP, qk_norm="per_head")
    assert normed.residuals[1]["attn"]["q"]["scale"] == pytest.approx(HEAD_DIM**-0.5)


@pytest.mark.fast
@pytest.mark.parametrize("policy", ["plain", "scaled", "deepnorm", "small"])
def test_matrices_in_blocks_start_smaller_by_the_root_of_the_width_under_every_policy(
    policy: str,
) -> None:
    """Policies made of the width already do; they are not divided twice."""
    stds = {}
    for width in (32, 128):
        config = build_config(_shape(width, 2), parametrization=MUP, init=policy)
        model = build_model(config)
        layer = model.model.layers[1]
        matrices = (layer.self_attn.q_proj, layer.mlp.down_proj)
        stds[width] = torch.stack([matrix.weight.std() for matrix in matrices])
        ends = (model.model.embed_tokens.weight.std(), model.lm_head.weight.std())
        assert torch.stack(ends).tolist() == pytest.approx([0.02] * 2, rel=0.1)
    assert (stds[128] / stds[32]).tolist() == pytest.approx([0.5] * 2, rel=0.1)


@pytest.mark.fast
def test_at_the_base_width_mup_is_standard_but_for_the_scale_of_scores() -> None:
    config = build_config(_shape(32, 2), parametrization=MUP)
    assert config.logits is None
    standard = build_model(build_config(_shape(32, 2))).state_dict()
    for name, weight in build_model(config).state_dict().items():
        assert torch.equal(weight, standard[name])
    groups = parameter_groups(build_model(config), _settings())
    assert {(group.lr_factor, group.eps_factor) for group in groups} == {(1.0, 1.0)}
    assert [group.weight_decay for group in groups] == [0.1, 0.0]


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("mupp", "expected standard or mup"),
        ({"name": "mup", "width": 3}, "no key 'width'; its keys: name, base_width, base_depth"),
        ({"name": "mup", "base_width": 0}, r"base_width is 0; expected a number above 0"),
        ({"name": "mup", "base_depth": -1}, r"base_depth is -1; expected a number above 0"),
        ({"name": "mup", "alpha": 1.0}, "alpha is for a base_depth"),
        ({"name": "standard", "base_width": 64}, "for 'mup' alone"),
        (3, "expected a name, or a mapping"),
    ],
)
def test_what_cannot_be_is_refused_by_name(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(SHAPE, parametrization=value)


@pytest.mark.fast
def test_mup_scales_the_scores_behind_the_last_norm_of_queries() -> None:
    """In front of a norm after RoPE the constant would be normalized away."""
    mup = {"name": "mup", "base_width": SHAPE["hidden_size"]}
    for rope, slot in (("before", "q"), ("after", "q_rotated")):
        qk_norm = {"layout": "per_head", "rope": rope}
        [layer, *_] = build_config(SHAPE, qk_norm=qk_norm, parametrization=mup).residuals
        assert layer["attn"][slot]["scale"] == pytest.approx(8**-0.5)
    assert "q" not in layer["attn"]
    with pytest.raises(ConfigError, match="ngpt_query cannot be multiplied by a constant"):
        build_config(SHAPE, norm="l2norm", placement="ngpt", parametrization=mup)


@pytest.mark.fast
def test_a_base_width_without_a_name_is_not_silently_standard() -> None:
    with pytest.raises(ConfigError, match="are for 'mup' alone"):
        build_config(SHAPE, parametrization={"base_width": 64})
