"""BHyT against its formula; its sites; the full form's given mean square."""

import pytest
import torch
from features import DIM, assert_follows_formula, assert_same, features, norm_of
from schemes import SHAPE

from llmnorm import build_config
from llmnorm.modeling.norms import BHyT, RMSNorm
from llmnorm.modeling.residual import NormSpec

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(("kappa", "eps"), [(10.0, 1e-6), (3.0, 0.1)])
def test_bhyt_is_the_weighted_tanh_of_the_normalized_features(kappa: float, eps: float) -> None:
    assert_follows_formula(
        norm_of("bhyt", lam=3.0, kappa=kappa, eps=eps, scale=0.5),
        lambda x, p: (
            0.5
            * p["weight"]
            * torch.tanh(p["lam"] / kappa * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps))
        ),
    )


def test_bhyt_is_bounded_by_its_weight_and_scale_free() -> None:
    x, norm = features(4, DIM), norm_of("bhyt", lam=5.0, eps=1e-12)
    assert (norm(1e9 * x).abs() <= norm.weight.abs()).all()
    assert_same(norm(1e9 * x), norm(x))


def test_bhyt_starts_near_rmsnorm_with_the_gain_lam_over_kappa() -> None:
    x = features(64, DIM)
    control = RMSNorm(DIM, weight_init=0.1)(x)
    torch.testing.assert_close(BHyT(DIM, lam=1.0)(x), control, rtol=0.04, atol=0)
    assert (BHyT(DIM, lam=1.0)(x).abs() < control.abs()).all()  # tanh: from below


def test_a_given_mean_square_replaces_that_of_the_features() -> None:
    x, norm = features(4, DIM), norm_of("bhyt")
    measured = x.pow(2).mean(-1, keepdim=True)
    assert torch.equal(norm(x, measured), norm(x))
    quarter = norm(x, 4.0 * (measured + 1e-6) - 1e-6)  # twice the RMS, so half the argument
    assert_same(quarter, norm(x / 2, measured))


def test_lam_is_two_for_attention_and_one_for_the_mlp_and_the_final_norm_an_rmsnorm() -> None:
    spec = NormSpec.parse({"op": "bhyt", "eps": 1e-5})
    at = {kind: spec.at(kind, 64) for kind in ("attn", "mlp", "final")}
    assert {kind: at[kind].options["lam"] for kind in ("attn", "mlp")} == {"attn": 2.0, "mlp": 1.0}
    assert at["final"].op == "rmsnorm"
    assert at["final"].options["eps"] == 1e-5


@pytest.mark.parametrize(
    ("given", "attn", "mlp"), [(3, 3, 3), ({"attn": 4.0}, 4.0, 1.0), ({"mlp": 0.5}, 2.0, 0.5)]
)
def test_lam_may_be_one_number_or_a_mapping_of_sites(
    given: object, attn: float, mlp: float
) -> None:
    spec = NormSpec.parse({"op": "bhyt", "lam": given})
    assert [spec.at(kind, 64).options["lam"] for kind in ("attn", "mlp")] == [attn, mlp]


def test_a_last_lam_makes_the_final_norm_bhyt() -> None:
    final = NormSpec.parse({"op": "bhyt", "last_lam": 2.0}).at("final", 64)
    assert final.op == "bhyt"
    assert final.options["lam"] == 2.0


def test_lam_has_no_final_site() -> None:
    with pytest.raises(ValueError, match="lam has no site 'final'; its sites: attn, mlp"):
        NormSpec.parse({"op": "bhyt", "lam": {"final": 2.0}}).at("final", 64)


def test_a_config_of_bhyt_holds_its_lams_by_site_and_an_rmsnorm_at_the_end() -> None:
    config = build_config(SHAPE, norm={"op": "bhyt", "lam": {"attn": 3.0}})
    layer = config.residuals[0]
    assert layer["attn"]["pre"]["lam"] == 3.0
    assert layer["mlp"]["pre"]["lam"] == 1.0
    assert config.final_norm["op"] == "rmsnorm"
