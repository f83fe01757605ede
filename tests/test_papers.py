"""`cite` names the papers of every choice, each once."""

import pytest

from llmnorm import build_config, cite
from llmnorm.build import source_of
from llmnorm.modeling.initialization import INIT_POLICIES
from llmnorm.modeling.residual import RESIDUALS, Residual
from llmnorm.modeling.weights import WeightSpec
from llmnorm.papers import PAPERS, arxiv

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("field", "name"), [(field, name) for field, names in PAPERS.items() for name in names]
)
def test_a_choice_that_is_no_class_brings_its_paper_and_no_other(field, name):
    usual = set(cite(build_config("debug")).splitlines())
    cited = set(cite(build_config("debug", **{field: name})).splitlines())
    assert cited - usual == {PAPERS[field][name]}
    assert usual <= cited


def test_every_init_policy_with_a_paper_names_the_one_of_its_docstring():
    for name, policy in INIT_POLICIES.items():
        assert arxiv(PAPERS["init"].get(name, "")) == arxiv(policy.__doc__), name


def test_every_way_to_hold_weights_but_the_plain_one_has_a_paper():
    assert {WeightSpec.parse(name).kind for name in PAPERS["weights"]} == set(PAPERS["weights"])
    for paper in PAPERS["weights"].values():
        assert arxiv(paper)


def test_a_residual_module_of_hand_made_wiring_names_its_paper():
    class Borrowed(Residual):
        """Join a branch as another paper does.

        Source: Nobody, "A joint of one's own", 2031, arXiv:3101.00001.
        """

    config = build_config("debug", num_hidden_layers=1)
    RESIDUALS["borrowed"] = Borrowed
    try:
        config.placement, config.norm, config.final_norm = None, None, None
        config.residuals = [{"attn": {"module": "borrowed"}, "mlp": {}}]
        assert "arXiv:3101.00001" in cite(config)
    finally:
        RESIDUALS.pop("borrowed")


@pytest.mark.parametrize("placement", ["ngpt", "deepnorm", "fixup", "sub_ln", "residual_dual"])
def test_a_paper_of_several_parts_of_a_scheme_is_named_once(placement):
    norm = {"ngpt": "l2norm", "fixup": "none"}.get(placement, "rmsnorm")
    numbers = arxiv(cite(build_config("debug", norm=norm, placement=placement)))
    assert len(numbers) == len(set(numbers))


def test_a_scheme_names_the_papers_of_what_its_placement_asks_beside_wiring():
    assert "2203.03466" in cite(build_config("debug", placement="completep"))
    assert "1910.05895" in cite(build_config("debug", placement="sdd"))
    lerp = source_of(RESIDUALS["lerp"])
    assert arxiv(lerp)[0] in cite(build_config("debug", norm="l2norm", placement="ngpt"))
