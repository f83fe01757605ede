"""Optimizers and their parameter groups, explicit and printed once.

Weight decay belongs to the matrices of linear layers, the head included, and to nothing else: not
to embeddings, norms, biases or a norm-free layer's alpha. The decision is made by module, not by
name patterns. Read `muon.py` for the one optimizer made of two.
"""

import importlib
import inspect
import logging
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from llmnorm.errors import ConfigError
from llmnorm.training.muon import MuonWithAdamW

logger = logging.getLogger(__name__)

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
    """Parameters that are treated alike; `names` as in the state dict."""

    branch: str
    weight_decay: float
    names: tuple[str, ...]
    elements: int

    def record(self) -> dict[str, Any]:
        """Return the group as JSON for environment.json."""
        return {
            "branch": self.branch,
            "weight_decay": self.weight_decay,
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


def _group(model: nn.Module, branch: str, weight_decay: float, names: list[str]) -> Group:
    parameters = dict(model.named_parameters())
    elements = sum(parameters[name].numel() for name in names)
    return Group(branch=branch, weight_decay=weight_decay, names=tuple(names), elements=elements)


def parameter_groups(model: PreTrainedModel, settings: OptimizerSettings) -> list[Group]:
    """Split the trainable parameters into decayed, undecayed and, for muon, hidden matrices.

    Muon takes the matrices of the linear layers inside the blocks; head and embedding, which map
    between tokens and features, stay with AdamW.
    """
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    matrices = linear_matrices(model)
    hidden: list[str] = []
    if settings.name == "muon":
        ends = _ends(model)
        hidden = [name for name in trainable if name in matrices and name not in ends]
    branch = "adamw" if settings.name == "muon" else settings.name
    decayed = [name for name in trainable if name in matrices and name not in hidden]
    rest = [name for name in trainable if name not in matrices]
    groups = [
        _group(model, "muon", settings.weight_decay, hidden),
        _group(model, branch, settings.weight_decay, decayed),
        _group(model, branch, 0.0, rest),
    ]
    return [group for group in groups if group.names]


def _ends(model: PreTrainedModel) -> set[str]:
    """Return the names of the embedding's and the head's parameters."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    ends = {id(p) for module in modules if module is not None for p in module.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ends}


def make_optimizer(model: PreTrainedModel, settings: OptimizerSettings) -> Any:
    """Return the optimizer of the run file for `model`.

    Args:
        model: the language model, on its final device.
        settings: `adamw`, `muon`, or a class as `package.module:Class`, which is called with the
            groups, `lr`, the options, and `betas` and `eps` where its signature names them.

    Raises:
        ConfigError: if the class cannot be imported or refuses its arguments, or the options
            repeat what has a key of its own.
    """
    _check_options(settings)
    groups = parameter_groups(model, settings)
    parameters = dict(model.named_parameters())
    split: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        members = [parameters[name] for name in group.names]
        entry = {"params": members, "weight_decay": group.weight_decay}
        split.setdefault(group.branch, []).append(entry)
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
    options = {"adjust_lr_fn": "match_rms_adamw", **settings.options}
    matrix_lr = options.pop("matrix_lr", settings.lr)
    muon = torch.optim.Muon(split.get("muon", []), lr=matrix_lr, **options)
    return MuonWithAdamW(muon, _adamw(split["adamw"], adam))


def _other(settings: OptimizerSettings, groups: list[dict[str, Any]], adam: dict[str, Any]) -> Any:
    module, _, name = settings.name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"optimizer.name={settings.name!r} cannot be imported ({error}); "
            "expected adamw, muon or package.module:Class"
        ) from error
    accepted = inspect.signature(factory).parameters
    shared = {key: value for key, value in adam.items() if key == "lr" or key in accepted}
    return factory(groups, **{**shared, **settings.options})


def describe_groups(model: PreTrainedModel, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Return the groups as JSON and log them, one line a group."""
    groups = parameter_groups(model, settings)
    for group in groups:
        logger.info(
            "optimizer %s: %d tensors, %d elements, weight decay %g",
            group.branch,
            len(group.names),
            group.elements,
            group.weight_decay,
        )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        logger.info("head and embedding share one matrix: it is decayed, as the head's")
    return [group.record() for group in groups]
