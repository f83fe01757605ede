"""Optimizers and their parameter groups, explicit and printed once.

Weight decay belongs to the matrices of linear layers, the head included, and to nothing else: not
to embeddings, norms, biases or a norm-free layer's alpha, nor to a matrix whose length the config
field `weights` holds or learns apart. The decision is made by module, not by name patterns. Under
muP (`modeling/parametrization.py`) the parameters of the blocks have their own learning rate,
weight decay and eps. Read `muon.py` for the one optimizer made of two.
"""

import importlib
import inspect
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from llmnorm.environment import is_out_of_memory
from llmnorm.errors import ConfigError, LlmNormError
from llmnorm.modeling.parametrization import Factors, Parametrization
from llmnorm.modeling.weights import WeightSpec
from llmnorm.training.muon import MuonWithAdamW

logger = logging.getLogger(__name__)

_MUON_SCALING = "match_rms_adamw"
_RUN_FILE_KEYS = ("lr", "weight_decay", "betas", "eps")


class OptimizerSettings(Protocol):
    """The run file's section `optimizer`."""

    name: str
    lr: float
    weight_decay: float
    betas: list[float]
    eps: float
    options: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parameters that are treated alike; `names` as in the state dict.

    `lr_factor` and `eps_factor` multiply the run file's numbers; `weight_decay` is the product.
    """

    branch: str
    weight_decay: float
    names: tuple[str, ...]
    elements: int
    lr_factor: float = 1.0
    eps_factor: float = 1.0

    def record(self) -> dict[str, Any]:
        """Return the group as JSON for environment.json."""
        return {
            "branch": self.branch,
            "weight_decay": self.weight_decay,
            "lr_factor": self.lr_factor,
            "eps_factor": self.eps_factor,
            "tensors": len(self.names),
            "elements": self.elements,
            "names": list(self.names),
        }


def linear_matrices(model: nn.Module) -> set[str]:
    """Return the names of the parameters that are matrices of linear layers.

    A matrix that head and embedding share counts: it is the head's, and is decayed as such.
    """
    owners = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.weight.ndim == 2
    }
    return {name for name, parameter in model.named_parameters() if id(parameter) in owners}


def parameter_groups(model: PreTrainedModel, settings: OptimizerSettings) -> list[Group]:
    """Split the trainable parameters into decayed, undecayed and, for muon, hidden matrices.

    Muon takes the matrices of the linear layers inside the blocks; head and embedding, which map
    between tokens and features, stay with AdamW. Under muP each of these splits by its factors.

    Raises:
        ConfigError: if muP's factors do not fit the optimizer.
    """
    _check_mup(model, settings)
    matrices, blocks = linear_matrices(model), _blocks(model)
    undecayed = _undecayed(model, matrices, blocks)
    others = "adamw" if settings.name == "muon" else settings.name
    members: dict[tuple[bool, bool, Factors], list[str]] = {}
    elements: Counter[tuple[bool, bool, Factors]] = Counter()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = name in matrices
        muon = settings.name == "muon" and matrix and name in blocks
        factors = Factors()
        if name in blocks:
            factors = _factors(model, settings, matrix=matrix, muon=muon)
        key = (muon, matrix and name not in undecayed, factors)
        members.setdefault(key, []).append(name)
        elements[key] += parameter.numel()
    return [
        Group(
            branch="muon" if muon else others,
            weight_decay=settings.weight_decay * factors.weight_decay if decayed else 0.0,
            names=tuple(members[muon, decayed, factors]),
            elements=elements[muon, decayed, factors],
            lr_factor=factors.lr,
            eps_factor=factors.eps,
        )
        for muon, decayed, factors in sorted(members, key=_order)
    ]


def _order(key: tuple[bool, bool, Factors]) -> tuple[bool, bool, float]:
    """Muon's matrices, other decayed matrices, the rest; hidden before head and embedding."""
    muon, decayed, factors = key
    return (not muon, not decayed, factors.lr)


def _undecayed(model: PreTrainedModel, matrices: set[str], blocks: set[str]) -> set[str]:
    """Return the matrices that are not decayed, since decay only acts on their length.

    nGPT (`unit`) has no decay; weight normalization's length is a parameter of its own, and decay
    of V would raise the step along its direction. Under `lawn` that is so once the norms are
    frozen; that the steps before are undecayed too is ours.
    """
    kind = WeightSpec.parse(model.config.weights).kind
    if kind == "unit":
        return matrices
    return matrices & blocks if kind in ("weight_norm", "lawn") else set()


def _check_mup(model: PreTrainedModel, settings: OptimizerSettings) -> None:
    """Refuse muP beside an optimizer for which its factors were not derived.

    They are Adam's, and `Factors` has Muon's. A class from elsewhere counts as Adam's kin if its
    signature names both betas and eps.
    """
    mup = Parametrization.parse(model.config.parametrization).name == "mup"
    if not mup or settings.name in ("adamw", "muon"):
        return
    if not {"betas", "eps"} <= inspect.signature(_imported(settings.name)).parameters.keys():
        raise ConfigError(
            f"optimizer.name={settings.name} is not like Adam (it takes no betas and eps), but the "
            "factors of parametrization 'mup' are Adam's; use adamw, muon or a class like Adam"
        )


def _factors(
    model: PreTrainedModel, settings: OptimizerSettings, *, matrix: bool, muon: bool
) -> Factors:
    """muP's factors of a parameter inside a block, by what its optimizer's update is like.

    Muon's orthogonal update has singular values of sqrt(width) when it is scaled to AdamW's root
    mean square, and of 1 in its original scaling.
    """
    config = model.config
    original = settings.options.get("adjust_lr_fn", _MUON_SCALING) == "original"
    return Parametrization.parse(config.parametrization).factors(
        config.hidden_size,
        config.num_hidden_layers,
        matrix=matrix,
        spectral=None if not muon else 0.0 if original else 0.5,
    )


def _blocks(model: PreTrainedModel) -> set[str]:
    """Return the names of the parameters inside the blocks."""
    trunk: Any = model.base_model
    inside = {id(parameter) for parameter in trunk.layers.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}


def make_optimizer(model: PreTrainedModel, settings: OptimizerSettings) -> Any:
    """Return the optimizer of the run file for `model`.

    Args:
        model: the language model, on its final device.
        settings: `adamw`, `muon`, or a class as `package.module:Class`, which is called with the
            groups, `lr`, the options, and `betas` and `eps` where its signature names them.

    Raises:
        ConfigError: if the class cannot be imported, refuses its arguments or does not fit muP, or
            the options repeat what has a key of its own.
    """
    _check_options(settings)
    groups = parameter_groups(model, settings)
    parameters = dict(model.named_parameters())
    split: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        split.setdefault(group.branch, []).append(_entry(group, parameters, settings))
    adam = {"lr": settings.lr, "betas": tuple(settings.betas), "eps": settings.eps}
    try:
        if settings.name == "adamw":
            return _adamw(split["adamw"], {**adam, **settings.options})
        if settings.name == "muon":
            return _muon(split, adam, settings)
        return _other(settings, split[settings.name], adam)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"optimizer.name={settings.name} refuses optimizer.options={settings.options}: {error}"
        ) from error


def _entry(
    group: Group, parameters: Mapping[str, nn.Parameter], settings: OptimizerSettings
) -> dict[str, Any]:
    """Return a group as an optimizer takes it; lr and eps only where they are its own."""
    entry: dict[str, Any] = {"params": [parameters[name] for name in group.names]}
    entry["weight_decay"] = group.weight_decay
    if group.lr_factor != 1:
        lr = (
            settings.options.get("matrix_lr", settings.lr)
            if group.branch == "muon"
            else settings.lr
        )
        entry["lr"] = lr * group.lr_factor
    if group.eps_factor != 1:
        entry["eps"] = settings.eps * group.eps_factor
    return entry


def _check_options(settings: OptimizerSettings) -> None:
    """Refuse options that would override a key of the run file or be ignored for it."""
    for key in settings.options:
        if key == "params":
            raise ConfigError("optimizer.options.params: the parameters are the model's; drop it")
        if key in _RUN_FILE_KEYS and (settings.name, key) != ("muon", "eps"):
            own = " (for muon: optimizer.options.matrix_lr)" if settings.name == "muon" else ""
            raise ConfigError(
                f"optimizer.options.{key} would contradict optimizer.{key}; set optimizer.{key} "
                f"instead{own if key == 'lr' else ''}"
            )


def _adamw(groups: list[dict[str, Any]], arguments: dict[str, Any]) -> torch.optim.Optimizer:
    """Return torch's AdamW, fused unless the options or the device say otherwise."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    arguments.setdefault("fused", devices <= {"cpu", "cuda"})
    return torch.optim.AdamW(groups, **arguments)


def _muon(
    split: dict[str, list[dict[str, Any]]], adam: dict[str, Any], settings: OptimizerSettings
) -> MuonWithAdamW:
    """Return Muon for hidden matrices beside AdamW for the rest.

    `options.matrix_lr` (default: `lr`) is Muon's learning rate, `options.eps` Muon's own; its
    update is scaled to AdamW's root mean square unless `options.adjust_lr_fn` says `original`.
    """
    options = {"adjust_lr_fn": _MUON_SCALING, **settings.options}
    matrix_lr = options.pop("matrix_lr", settings.lr)
    muon = torch.optim.Muon(split.get("muon", []), lr=matrix_lr, **options)
    return MuonWithAdamW(muon, _adamw(split["adamw"], adam))


def _imported(path: str) -> Any:
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"optimizer.name={path!r} cannot be imported ({error}); "
            "expected adamw, muon or package.module:Class"
        ) from error


def _other(settings: OptimizerSettings, groups: list[dict[str, Any]], adam: dict[str, Any]) -> Any:
    factory = _imported(settings.name)
    accepted = inspect.signature(factory).parameters
    shared = {key: value for key, value in adam.items() if key == "lr" or key in accepted}
    return factory(groups, **{**shared, **settings.options})


@contextmanager
def naming_a_failure(optimizer: Any) -> Iterator[None]:
    """Enclose the first step: an optimizer that cannot do it is the run file's mistake.

    Raises:
        ConfigError: instead of what the step raised, unless memory was refused.
    """
    try:
        yield
    except LlmNormError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        seen = str(error).partition("\n")[0]
        raise ConfigError(
            f"{type(optimizer).__name__} fails in its first step ({seen}); change "
            "optimizer.name or optimizer.options"
        ) from error


def describe_groups(model: PreTrainedModel, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Return the groups as JSON and log them, one line a group."""
    groups = parameter_groups(model, settings)
    for group in groups:
        logger.info(
            "optimizer %s: %d tensors, %d elements, weight decay %g, lr x %g, eps x %g",
            *(group.branch, len(group.names), group.elements),
            *(group.weight_decay, group.lr_factor, group.eps_factor),
        )
    kind = WeightSpec.parse(model.config.weights).kind
    if _undecayed(model, linear_matrices(model), _blocks(model)):
        logger.info("weights %s: its matrices are not decayed", kind)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if kind != "unit" and head is not None and head.weight is embedding.weight:
        logger.info("head and embedding share one matrix: it is decayed, as the head's")
    return [group.record() for group in groups]
