"""Every scheme has a recipe, and what `llmnorm list schemes` says of it is true."""

from dataclasses import fields

import pytest
import transformers

from llmnorm import build_config, cli, list_norms, list_placements
from llmnorm.errors import ConfigError
from llmnorm.listing import known_facts
from llmnorm.modeling.operations import operation
from llmnorm.modeling.weights import WeightSpec
from llmnorm.placements import PLACEMENTS as REGISTERED
from llmnorm.recipes import NORMS, OPERATORS, PLACEMENTS, WEIGHTS
from llmnorm.recipes.facts import KINDS, REFERENCE, arxiv, named, scheme, schemes

pytestmark = pytest.mark.fast

RECIPES = {
    f"{kind} {name}": recipe
    for kind, recipes in (
        ("placement", PLACEMENTS),
        ("norm", NORMS),
        ("operator", OPERATORS),
        ("weights", WEIGHTS),
    )
    for name, recipe in recipes.items()
}


def ours(names: list[str], find) -> set[str]:
    """Without those that other tests register."""
    return {name for name in names if find(name).__module__.startswith("llmnorm.")}


@pytest.mark.parametrize(
    ("registered", "recipes"),
    [
        (ours(list_placements(), REGISTERED.__getitem__), set(PLACEMENTS)),
        (ours(list_norms(), operation), set(NORMS)),
    ],
    ids=["placements", "norms"],
)
def test_every_scheme_has_a_recipe_and_every_recipe_a_scheme(registered, recipes):
    assert sorted(registered - recipes) == [], "without a recipe in llmnorm/recipes"
    assert sorted(recipes - registered) == [], "recipes of what is not registered"


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_recipe_of_weights_is_a_way_to_hold_them(name):
    assert WeightSpec.parse(name).kind == name


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_answers_every_question_in_single_lines(name):
    recipe = RECIPES[name]
    for field in fields(recipe):
        text = getattr(recipe, field.name)
        assert text or field.default == ""
        assert text == " ".join(text.split())


@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name].classes])
def test_the_class_that_can_hold_a_scheme_is_one_of_transformers(name):
    for cls in RECIPES[name].classes:
        assert issubclass(getattr(transformers, cls), transformers.PreTrainedModel)


@pytest.mark.parametrize("kind", KINDS)
def test_every_scheme_names_a_paper_by_its_arxiv_number(kind):
    for held in schemes(kind):
        if held.name != "none":
            assert arxiv(held.source), held.name


def test_init_embedding_and_final_norm_are_read_from_the_code():
    deepnorm, peri, derf = scheme("deepnorm"), scheme("peri_ln"), scheme("derf", "norm")
    assert (deepnorm.init, deepnorm.final_norm) == ("deepnorm", "none")
    assert peri.embedding == "norm (rmsnorm)"
    assert (derf.kind, derf.embedding, derf.final_norm) == ("norm", "scale", "derf")


def test_parameters_and_norms_are_counted_against_pre_ln_with_rmsnorm():
    shape = build_config(REFERENCE)
    depth, width, mlp = shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size
    assert (scheme("pre_ln").parameters, scheme("pre_ln").norms) == (0, 2 * depth + 1)
    assert (scheme("post_ln").parameters, scheme("post_ln").norms) == (-width, 2 * depth)
    assert (scheme("peri_ln").parameters, scheme("peri_ln").norms) == (
        (2 * depth + 1) * width,
        4 * depth + 2,
    )
    assert scheme("sub_ln").parameters == depth * (width + mlp)
    assert scheme("layernorm", "norm").parameters == (2 * depth + 1) * width  # the biases
    assert (
        scheme("dyt", "norm").parameters == 2 * depth + 1 + 1
    )  # an alpha a site, the embedding's scale


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_shown_of_a_scheme_holds_its_recipe_and_what_its_code_asks(kind):
    for held in schemes(kind):
        facts = known_facts(held)
        assert held.recipe is None or facts["formula"] == held.recipe.formula
        assert facts["init"] == held.init
        assert f"{held.norms} norms" in facts["cost"]


def test_a_scheme_of_no_name_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="no scheme is named 'mixln'; did you mean mix_ln"):
        named("mixln")


@pytest.mark.parametrize("width", [80, 120])
def test_the_list_of_schemes_fits_a_terminal(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    for words in (["list", "schemes"], ["list", "schemes", "mix_ln"]):
        assert cli._dispatch(words) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(len(line) for line in lines) <= width
        assert any("mix_ln" in line for line in lines)


def test_a_name_of_two_kinds_shows_both():
    assert [part.kind for part in named("bhyt")] == ["placement", "norm"]


def test_a_formula_with_brackets_is_shown_as_it_is(capsys):
    assert cli._dispatch(["list", "schemes", "powernorm"]) == 0
    assert OPERATORS["powernorm"].formula in capsys.readouterr().out


def test_only_schemes_take_a_name():
    with pytest.raises(ConfigError, match="llmnorm list norms takes no name; saw 'rmsnorm'"):
        cli._dispatch(["list", "norms", "rmsnorm"])
