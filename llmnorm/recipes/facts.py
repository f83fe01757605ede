"""What the code knows of each scheme: read from placements, specs and models on the meta device."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from llmnorm.build import build_config, source_of
from llmnorm.environment import parameter_counts
from llmnorm.errors import ConfigError
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.initialization import InitSpec
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM
from llmnorm.modeling.operations import list_norms, operation
from llmnorm.modeling.weights import WeightSpec
from llmnorm.placements import PLACEMENTS, list_placements, parse_placement
from llmnorm.resources import suggest
from llmnorm.selftest import promised_slots

from .norms import NORMS, WEIGHTS
from .placements import PLACEMENTS as PLACED
from .recipe import Recipe

REFERENCE = "130m"  # the preset at which parameters and norms are counted
KINDS = ("placement", "norm", "weights")
_RECIPES: dict[str, dict[str, Recipe]] = {"placement": PLACED, "norm": NORMS, "weights": WEIGHTS}


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One placement, norm or way to hold weights: its recipe and the config it resolves to.

    Args:
        name: as a run file has it.
        kind: one of `KINDS`; the other two choices are those of the baseline, pre_ln + rmsnorm.
        recipe: None for a scheme registered outside llmnorm.
        part: the class that was registered.
        config: at the shape `REFERENCE`.
    """

    name: str
    kind: str
    recipe: Recipe | None
    part: type
    config: LlmNormConfig

    @property
    def source(self) -> str:
        """Authors, title, year and arXiv number."""
        return source_of(self.part) or (self.recipe.paper if self.recipe else "")

    @property
    def options(self) -> str:
        """Names of the options that a run file may give."""
        if self.kind == "weights":
            return ""
        parameters = inspect.signature(self.part).parameters.values()
        return ", ".join(p.name for p in parameters if p.default is not p.empty)

    @property
    def summary(self) -> str:
        """The first paragraph of the class's docstring."""
        if self.kind == "weights":
            return ""
        return (inspect.getdoc(self.part) or "").partition("\n\n")[0].replace("\n", " ")

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

    @property
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


def schemes(kind: str) -> list[Scheme]:
    """All of one kind, by name."""
    return [_scheme(name, kind) for name in _names()[kind]]


def scheme(name: str) -> Scheme:
    """The scheme of this name.

    Raises:
        ConfigError: for an unknown name, with the nearest known one.
    """
    known = {held: kind for kind in KINDS for held in _names()[kind]}
    if name not in known:
        raise ConfigError(f"no scheme is named {name!r}{suggest(name, list(known))}")
    return _scheme(name, known[name])


@cache
def baseline_parameters() -> int:
    """Parameters of pre_ln with rmsnorm at `REFERENCE`."""
    return _counted(build_config(REFERENCE))


def arxiv(source: str) -> list[str]:
    """The arXiv numbers in a source."""
    return re.findall(r"arXiv:(\d{4}\.\d{4,5})", source)


def _names() -> Mapping[str, list[str]]:
    """Registered names of each kind: those with recipes in the recipes' order, then the others."""
    registered = {"placement": list_placements(), "norm": list_norms(), "weights": list(WEIGHTS)}
    ranks = {kind: {name: i for i, name in enumerate(_RECIPES[kind])} for kind in KINDS}
    return {
        kind: sorted(names, key=lambda name: ranks[kind].get(name, len(ranks[kind])))
        for kind, names in registered.items()
    }


def _scheme(name: str, kind: str) -> Scheme:
    choice: dict[str, Any] = {kind: name}
    part: type = WeightSpec
    if kind == "placement":
        part = PLACEMENTS[name]
        accepted = parse_placement(name).accepts
        if accepted is not None and "rmsnorm" not in accepted:
            choice["norm"] = accepted[0]
    elif kind == "norm":
        part = operation(name)
    config = build_config(REFERENCE, **choice)
    recipe = _RECIPES[kind].get(name)
    return Scheme(name=name, kind=kind, recipe=recipe, part=part, config=config)


def _counted(config: LlmNormConfig) -> int:
    with torch.device("meta"):
        return parameter_counts(LlmNormForCausalLM(config))["total"]
