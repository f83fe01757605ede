"""Run files that nobody would write: any value anywhere, and what is dumped reads back equal."""

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmnorm.config import RunConfig, load_run_config
from llmnorm.config.document import read_document
from llmnorm.config.dump import dump_document
from llmnorm.config.problems import leaves
from llmnorm.errors import ConfigError

SCALARS = st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1)
SCALARS |= st.floats(allow_nan=False, allow_infinity=False)
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n"), max_size=20)
TRICKY = st.sampled_from(["1e-3", "no", "~", "null", "", "010", ".nan", "1_0", "<<", "a: b", "- a"])
VALUES = st.recursive(
    SCALARS | TEXT | TRICKY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.dictionaries(TEXT | TRICKY, VALUES, max_size=4))
def test_what_is_dumped_is_read_back_equal(value):
    assert read_document(dump_document(value), "test").value == value


# Mutations of a good run file: any value anywhere, keys renamed, dropped or added.
ANYTHING = VALUES | st.floats() | st.sampled_from(["debug", "mix_ln", "dyt", "auto", "x" * 5000])
MUTATED_KEYS = [tuple(path) for path in leaves(RunConfig)]
MUTATED_KEYS += [("model",), ("model", "norm"), ("model", "norm", "alpha"), ("model", "placement")]
MUTATED_KEYS += [("model", "placement", "fraction"), ("model", "overrides", "hidden_size")]
MUTATED_KEYS += [("model", "overrides", "num_hidden_layers"), ("model", "overrides", "qk_norm")]
MUTATED_KEYS += [("model", "overrides", "embedding"), ("model", "overrides", "init")]
MUTATED_KEYS += [("model", "overrides", "rope_parameters"), ("training",), ("mdoel",), ("data",)]
MUTATIONS = st.lists(
    st.tuples(st.sampled_from(MUTATED_KEYS), st.sampled_from(["set", "drop", "typo"]), ANYTHING),
    min_size=1,
    max_size=3,
)


def mutate(run: dict[str, Any], path: tuple[str, ...], how: str, value: Any) -> None:
    for part in path[:-1]:
        run = run.setdefault(part, {})
        if not isinstance(run, dict):
            return
    if how == "set":
        run[path[-1]] = value
    elif how == "drop":
        run.pop(path[-1], None)
    else:
        run[path[-1][1:] + "x"] = run.pop(path[-1], value)


@settings(
    max_examples=300,
    derandomize=True,
    deadline=2000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(MUTATIONS)
def test_a_mutated_run_file_builds_or_is_refused_in_plain_lines(tmp_path, mutations):
    path = tmp_path / "run.yaml"
    run = read_document(load_run_config("quickstart").to_yaml(), "test").value
    for key, how, value in mutations:
        mutate(run, key, how, value)
    try:
        path.write_text(dump_document(run), encoding="utf-8")
        config = load_run_config(path)
    except ConfigError as error:
        for line in str(error).split("\n"):
            assert line.isprintable()
            assert 0 < len(line) <= 300
    else:
        path.write_text(config.to_yaml(), encoding="utf-8")
        assert load_run_config(path) == config
