"""`model.start` and `training.init_from`: the weights of a finished model as the start of a run.

Names and shapes must fit, and so must what they do not tell: how the norms are wired, how matrices
are held, and whether the head is the embedding. Starts that a scheme measures are not compared: the
weights that are copied replace them.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmnorm import LlmNormConfig
from llmnorm.calibration import unmeasured
from llmnorm.errors import CheckpointError
from llmnorm.modeling.initialization import InitSpec
from llmnorm.modeling.parametrization import Parametrization
from llmnorm.modeling.weights import WeightSpec
from llmnorm.safe_files import check_inside, open_safetensors, read_json
from llmnorm.training.directory import flatten

logger = logging.getLogger(__name__)


def load_weights(model: PreTrainedModel, folder: Path, *, key: str = "training.init_from") -> None:
    """Copy the weights of a Hugging Face folder (safetensors) into a model of the same shape.

    Args:
        model: to fill.
        folder: with config.json and weights.
        key: of the run file that named it, for messages.

    Raises:
        CheckpointError: if there are none, they are not finite, or names, shapes, ties or wiring
            differ (the first are named).
    """
    _check_wiring(model, folder, key)
    wanted = dict(model.named_parameters())
    stored = _read(
        folder, key, 1000 + 4 * len(wanted), lambda handle, name: handle.get_tensor(name)
    )
    ties = _ties(model)
    problems = _differences(wanted, stored, ties)
    problems += [
        f"{name} is not {owner}, to which this model ties it"
        for name, owner in ties.items()
        if name in stored and owner in stored and not torch.equal(stored[name], stored[owner])
    ]
    problems += [f"{name} is not finite" for name, t in stored.items() if not _is_finite(t)]
    _refuse(folder, problems, key)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(stored[name])
    logger.info("weights taken from %s", folder)


def check_weights(model: PreTrainedModel, folder: Path, *, key: str = "training.init_from") -> None:
    """Check without reading values whether `load_weights` would take a folder.

    Raises:
        CheckpointError: if there are no weights, or names, shapes or wiring differ.
    """
    _check_wiring(model, folder, key)
    wanted = dict(model.named_parameters())

    def shape(handle: Any, name: str) -> Tensor:
        return torch.empty(handle.get_slice(name).get_shape(), device="meta")

    stored = _read(folder, key, 1000 + 4 * len(wanted), shape)
    _refuse(folder, _differences(wanted, stored, _ties(model)), key)


def _differences(
    wanted: Mapping[str, Tensor], stored: Mapping[str, Tensor], ties: Mapping[str, str]
) -> list[str]:
    problems = [f"{name} is missing" for name in wanted.keys() - stored.keys()]
    problems += [
        f"{name} is not in the model" for name in stored.keys() - wanted.keys() - ties.keys()
    ]
    return problems + _shape_problems(wanted, stored)


def _refuse(folder: Path, problems: list[str], key: str) -> None:
    if problems:
        raise CheckpointError(
            f"{key}={folder} holds another model ({'; '.join(sorted(problems)[:3])}); "
            "expected the weights of this preset, norm and placement"
        )


def _read(
    folder: Path, key: str, most_tensors: int, get: Callable[[Any, str], Tensor]
) -> dict[str, Tensor]:
    """Return all tensors of a folder's safetensors files, each got from its open file."""
    stored: dict[str, Tensor] = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            check_inside(path, folder)
            with open_safetensors(path, most_tensors=most_tensors) as handle:
                stored.update({name: get(handle, name) for name in list(handle.keys())})
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{key}: weights cannot be read: {error}") from error
    if not stored:
        raise CheckpointError(f"{key}={folder}: there are no *.safetensors weights")
    return stored


def _is_finite(tensor: Tensor) -> bool:
    """Whether all elements are numbers; types of one byte are not asked, torch cannot."""
    return tensor.itemsize == 1 or bool(tensor.isfinite().all())


def _check_wiring(model: PreTrainedModel, folder: Path, key: str) -> None:
    """Refuse weights of the same shapes but another meaning, as far as their config tells it."""
    assert isinstance(model.config, LlmNormConfig)
    path = folder / "config.json"
    try:
        check_inside(path, folder)
        text = read_json(path)
        wanted = _wiring(model.config)
        if text.get("model_type") == LlmNormConfig.model_type:
            stored = _wiring(LlmNormConfig.from_dict(text))
        else:
            stored = {**wanted, "weights": "plain"}
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{key}: {path} cannot be read: {error}") from error
    for what in [*wanted, *stored]:
        if stored.get(what) != wanted.get(what):
            raise CheckpointError(
                f"{key}={folder} holds another model: its {what} is {stored.get(what)}, "
                f"this run's {wanted.get(what)}; expected the same norm, placement and overrides"
            )


def _wiring(config: LlmNormConfig) -> dict[str, Any]:
    """Return what the weights' names and shapes do not tell, under dotted keys."""
    norm, embedding = config.final_norm_spec(), config.embedding_spec()
    weights = WeightSpec.parse(config.weights).kind
    return flatten(
        {
            "num_attention_heads": config.num_attention_heads,
            "hidden_act": config.hidden_act,
            "position": config.position,
            "rope_theta": config.rope_parameters["rope_theta"] if config.position == "rope" else 0,
            "residuals": {
                str(index): {
                    "attn": unmeasured(attn).to_dict(),
                    "mlp": unmeasured(mlp).to_dict(),
                }
                for index, (attn, mlp) in enumerate(config.residual_specs())
            },
            "final_norm": norm and norm.to_dict(),
            "logits": config.logits,
            "streams": config.streams,
            "weights": weights,
            "projected": _lengths(config) if weights == "project" else None,
            "embedding": embedding.treatment,
            "embedding_norm": embedding.norm and embedding.norm.to_dict(),
        }
    )


def _lengths(config: LlmNormConfig) -> dict[str, Any]:
    """What says how long `project` keeps a matrix: one of another length is rescaled at once."""
    return {
        "init": InitSpec.parse(config.init).policy,
        "initializer_range": config.initializer_range,
        "width_ratio": Parametrization.parse(config.parametrization).width_ratio(
            config.hidden_size
        ),
    }


def _ties(model: PreTrainedModel) -> dict[str, str]:
    """Return the names under which a parameter stands a second time, with its first name."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    state = model.state_dict(keep_vars=True)
    return {key: first[id(p)] for key, p in state.items() if first.get(id(p), key) != key}


def _shape_problems(wanted: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{name} is {tuple(stored[name].shape)} and not {tuple(parameter.shape)}"
        for name, parameter in wanted.items()
        if name in stored and stored[name].shape != parameter.shape
    ]
