"""Every scheme has a recipe, and what `llmnorm list schemes` says of it is true."""

import contextlib
from dataclasses import fields

import pytest
import transformers

from llmnorm import build_config, cli, list_norms, list_placements
from llmnorm.errors import ConfigError
from llmnorm.listing import known_facts
from llmnorm.modeling.operations import operation
from llmnorm.modeling.weights import WeightSpec
from llmnorm.papers import arxiv
from llmnorm.placements import PLACEMENTS
from llmnorm.recipes import NORM_RECIPES, OPERATOR_RECIPES, PLACEMENT_RECIPES, WEIGHT_RECIPES
from llmnorm.recipes.facts import KINDS, REFERENCE, choice, choices, named, options_of

RECIPES = {
    f"{kind} {name}": recipe
    for kind, recipes in (
        ("placement", PLACEMENT_RECIPES),
        ("norm", NORM_RECIPES),
        ("operator", OPERATOR_RECIPES),
        ("weights", WEIGHT_RECIPES),
    )
    for name, recipe in recipes.items()
}


def ours(names: list[str], find) -> set[str]:
    """Without those that other tests register."""
    return {name for name in names if find(name).__module__.startswith("llmnorm.")}


@pytest.mark.parametrize(
    ("registered", "recipes"),
    [
        (ours(list_placements(), PLACEMENTS.__getitem__), set(PLACEMENT_RECIPES)),
        (ours(list_norms(), operation), set(NORM_RECIPES)),
    ],
    ids=["placements", "norms"],
)
def test_every_scheme_has_a_recipe_and_every_recipe_a_scheme(registered, recipes):
    assert sorted(registered - recipes) == [], "without a recipe in llmnorm/recipes"
    assert sorted(recipes - registered) == [], "recipes of what is not registered"


@pytest.mark.parametrize("name", WEIGHT_RECIPES)
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
    for held in choices(kind):
        if held.name != "none":
            assert arxiv(held.source), held.name


class Asked(dict):
    """Options of a norm that remember which of them were asked for."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def pop(self, name, *default):
        self.names.add(name)
        return super().pop(name, *default)

    def get(self, name, default=None):
        self.names.add(name)
        return super().get(name, default)


@pytest.mark.parametrize("name", NORM_RECIPES)
def test_every_option_that_a_norm_reads_in_a_config_is_shown(name):
    cls, asked = operation(name), Asked()
    if resolve := getattr(cls, "options_at", None):
        resolve(asked, "final", 64)
    assert asked.names <= set(options_of(cls))
    assert set(options_of(cls)) <= set(choice(name, "norm").options.split(", ")) | {""}


@pytest.mark.parametrize(
    ("kind", "name", "option", "value"),
    [
        ("norm", "bhyt", "last_lam", 1.0),
        ("norm", "tapernorm", "final", "taper"),
        ("norm", "rmsnorm", "eps", 1e-5),
        ("placement", "mix_ln", "fraction", 0.5),
        ("weights", "project", "interval_steps", 7),
        ("weights", "lawn", "free_steps", 7),
    ],
)
def test_an_option_that_a_run_file_may_give_is_shown_in_both_lists(
    kind, name, option, value, capsys, monkeypatch
):
    key = {"norm": "op", "placement": "name", "weights": "kind"}[kind]
    build_config("debug", **{kind: {key: name, option: value}})
    assert option in known_facts(choice(name, kind))["options"].split(", ")
    if kind != "weights":
        monkeypatch.setenv("COLUMNS", "400")
        assert cli._dispatch(["list", f"{kind}s"]) == 0
        row = next(line for line in capsys.readouterr().out.splitlines() if f" {name} " in line)
        assert option in row


@pytest.mark.parametrize("name", WEIGHT_RECIPES)
def test_ways_to_hold_weights_show_the_options_they_take_and_no_other(name):
    shown = set(choice(name, "weights").options.split(", "))
    for option, value in (("interval_steps", 7), ("free_steps", 7)):
        with (
            contextlib.nullcontext()
            if option in shown
            else pytest.raises(ValueError, match="has no option")
        ):
            WeightSpec.parse({"kind": name, option: value})


def test_init_embedding_and_final_norm_are_read_from_the_code():
    deepnorm, peri, derf = choice("deepnorm"), choice("peri_ln"), choice("derf", "norm")
    assert (deepnorm.init, deepnorm.final_norm) == ("deepnorm", "none")
    assert peri.embedding == "norm (rmsnorm)"
    assert (derf.kind, derf.embedding, derf.final_norm) == ("norm", "scale", "derf")


def test_parameters_and_norms_are_counted_against_pre_ln_with_rmsnorm():
    shape = build_config(REFERENCE)
    depth, width, mlp = shape.num_hidden_layers, shape.hidden_size, shape.intermediate_size
    assert (choice("pre_ln").parameters, choice("pre_ln").norms) == (0, 2 * depth + 1)
    assert (choice("post_ln").parameters, choice("post_ln").norms) == (-width, 2 * depth)
    assert (choice("peri_ln").parameters, choice("peri_ln").norms) == (
        (2 * depth + 1) * width,
        4 * depth + 2,
    )
    assert choice("sub_ln").parameters == depth * (width + mlp)
    assert choice("layernorm", "norm").parameters == (2 * depth + 1) * width  # the biases
    assert (
        choice("dyt", "norm").parameters == 2 * depth + 1 + 1
    )  # an alpha a site, the embedding's scale


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_shown_of_a_scheme_holds_its_recipe_and_what_its_code_asks(kind):
    for held in choices(kind):
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
    assert [entry.kind for entry in named("bhyt")] == ["placement", "norm"]


def test_a_formula_with_brackets_is_shown_as_it_is(capsys):
    assert cli._dispatch(["list", "schemes", "powernorm"]) == 0
    assert OPERATOR_RECIPES["powernorm"].formula in capsys.readouterr().out


def test_only_schemes_take_a_name():
    with pytest.raises(ConfigError, match="llmnorm list norms takes no name; saw 'rmsnorm'"):
        cli._dispatch(["list", "norms", "rmsnorm"])
