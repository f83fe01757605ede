"""What the code knows of each scheme: read from placements, specs and models on the meta device."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch

from llmnorm.build import build_config, source_of
from llmnorm.environment import parameter_counts
from llmnorm.errors import ConfigError
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.initialization import InitSpec
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM
from llmnorm.modeling.operations import list_norms, operation
from llmnorm.modeling.weights import WEIGHT_OPTIONS, WeightSpec
from llmnorm.papers import PAPERS
from llmnorm.placements import PLACEMENTS, list_placements, parse_placement
from llmnorm.resources import suggest
from llmnorm.running_norms import PowerNorm, UnifiedNorm
from llmnorm.selftest import promised_slots

from .norms import NORM_RECIPES, OPERATOR_RECIPES, WEIGHT_RECIPES
from .placements import PLACEMENT_RECIPES
from .recipe import Recipe

REFERENCE = "130m"  # the preset at which parameters and norms are counted
KINDS = ("placement", "norm", "weights")
_RECIPES: dict[str, dict[str, Recipe]] = {
    "placement": PLACEMENT_RECIPES,
    "norm": NORM_RECIPES,
    "weights": WEIGHT_RECIPES,
}
_OPERATORS: dict[str, type] = {"powernorm": PowerNorm, "unified_norm": UnifiedNorm}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One name of the tables, with its class and recipe.

    Args:
        name: as a run file has it.
        kind: one of `KINDS`, or `operator` for one that stands in no model.
        recipe: None for what is registered outside llmnorm.
        cls: the class registered under the name; `WeightSpec` for all ways to hold weights.
    """

    name: str
    kind: str
    recipe: Recipe | None
    cls: type

    @property
    def source(self) -> str:
        """Authors, title, year and arXiv number."""
        return PAPERS["weights"][self.name] if self.kind == "weights" else source_of(self.cls)

    @property
    def options(self) -> str:
        """Names of the options that a run file may give."""
        if self.kind == "weights":
            return ", ".join(WEIGHT_OPTIONS[self.name])
        return ", ".join(options_of(self.cls))

    @property
    def summary(self) -> str:
        """The first paragraph of the class's docstring."""
        if self.kind == "weights":
            return ""
        return summary_of(self.cls)


@dataclass(frozen=True, kw_only=True)
class Choice(Entry):
    """A placement, norm or way to hold weights: a choice of a run file, and what it resolves to.

    Args:
        config: at the shape `REFERENCE`; the choices beside this one are those of the baseline,
            pre_ln + rmsnorm.
    """

    config: LlmNormConfig

    @property
    def init(self) -> str:
        """The policy of initial weights."""
        return InitSpec.parse(self.config.init).policy

    @property
    def embedding(self) -> str:
        """What happens between the embedding and the first block."""
        spec = self.config.embedding_spec()
        return spec.treatment if spec.norm is None else f"{spec.treatment} ({spec.norm.op})"

    @property
    def final_norm(self) -> str:
        """The norm before the head."""
        spec = self.config.final_norm_spec()
        return "none" if spec is None else spec.op

    @cached_property
    def parameters(self) -> int:
        """Parameters beyond those of the baseline."""
        return _counted(self.config) - baseline_parameters()

    @property
    def norms(self) -> int:
        """Norms in the model: each is a reduction over features, but for point-wise ones."""
        held = [spec for _, spec, _ in promised_slots(self.config) if spec is not None]
        return sum(spec.op in list_norms() and spec.op != "none" for spec in held)

    @property
    def streams(self) -> int:
        """Residual streams that are carried along."""
        return 1 if self.config.streams is None else 2


def options_of(cls: type) -> list[str]:
    """Names of the options that a run file may give a norm, gain or placement.

    Those of its constructor, and those that its class declares as `config_options` because they
    are resolved before a module is built.
    """
    parameters = inspect.signature(cls).parameters.values()
    own = [p.name for p in parameters if p.default is not p.empty]
    return [*own, *getattr(cls, "config_options", ())]


def summary_of(cls: type) -> str:
    """The first paragraph of a class's docstring."""
    return (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " ")


def choices(kind: str) -> list[Choice]:
    """All of one kind: those with recipes in the recipes' order, then the others."""
    recipes = list(_RECIPES[kind])
    names = sorted(_names()[kind], key=lambda n: recipes.index(n) if n in recipes else len(recipes))
    return [choice(name, kind) for name in names]


def operators() -> list[Entry]:
    """The norms by running statistics, which stand in no model."""
    return [
        Entry(name=name, kind="operator", recipe=recipe, cls=_OPERATORS[name])
        for name, recipe in OPERATOR_RECIPES.items()
    ]


def named(name: str) -> list[Entry]:
    """What has this name: schemes of any kind, and operators.

    Raises:
        ConfigError: for an unknown name, with the nearest known one.
    """
    found = [entry for entry in operators() if entry.name == name]
    found += [choice(name, kind) for kind in KINDS if name in _names()[kind]]
    if not found:
        known = [*_OPERATORS, *(held for names in _names().values() for held in names)]
        raise ConfigError(f"no scheme is named {name!r}{suggest(name, known)}")
    return found


def choice(name: str, kind: str = "placement") -> Choice:
    """The choice of this name and kind."""
    chosen: dict[str, Any] = {kind: name}
    cls: type = WeightSpec
    if kind == "placement":
        cls = PLACEMENTS[name]
        accepted = parse_placement(name).accepts
        if accepted is not None and "rmsnorm" not in accepted:
            chosen["norm"] = accepted[0]
    elif kind == "norm":
        cls = operation(name)
    config = build_config(REFERENCE, **chosen)
    recipe = _RECIPES[kind].get(name)
    return Choice(name=name, kind=kind, recipe=recipe, cls=cls, config=config)


@cache
def baseline_parameters() -> int:
    """Parameters of pre_ln with rmsnorm at `REFERENCE`."""
    return _counted(build_config(REFERENCE))


def _names() -> Mapping[str, list[str]]:
    return {"placement": list_placements(), "norm": list_norms(), "weights": list(WEIGHT_RECIPES)}


def _counted(config: LlmNormConfig) -> int:
    with torch.device("meta"):
        return parameter_counts(LlmNormForCausalLM(config))["total"]
