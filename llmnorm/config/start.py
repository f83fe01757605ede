"""`model.start`: a run that begins with a finished model takes what it is from that model.

Shape, norm, placement and weights are those of a run or of its Hugging Face folder. The keys beside
`model.start` that would say the same are filled from it, so that the resolved run file names the
scheme like any other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.operations import read_choice
from llmnorm.safe_files import read_json

HAND_MADE = "hand_made"
"""Stands for norm and placement of a model whose wiring follows no rule."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """The model that `model.start` names: its folder, and its scheme as asked for when built."""

    folder: Path
    norm: dict[str, Any]
    placement: dict[str, Any]


def model_folder(start: Path) -> Path:
    """Return the Hugging Face folder that a path means: itself, or the `final` of a run.

    Raises:
        ValueError: if it is neither, or a run that is not finished.
    """
    if (start / "config.json").is_file():
        return start
    if (start / "final" / "config.json").is_file():
        return start / "final"
    if (start / "config.yaml").is_file():
        raise ValueError("this run is not finished; expected its final model")
    raise ValueError("expected a finished run or a Hugging Face folder (config.json)")


def read_config(folder: Path) -> LlmNormConfig:
    """Return the config of a model of ours.

    Raises:
        ValueError: if it is another kind of model, or cannot be read.
    """
    try:
        content = read_json(folder / "config.json")
        if not isinstance(content, dict):
            raise ValueError("expected a mapping")
        kind = content.get("model_type")
        if kind == LlmNormConfig.model_type:
            config = LlmNormConfig.from_dict(content)
            config.residual_specs()
            config.final_norm_spec()
            return config
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {error}") from error
    raise ValueError(f"this is a {kind} model; llmnorm import makes it one of ours")


def read_start(start: Path) -> Start:
    """Return what `model.start` names.

    Raises:
        ValueError: as `model_folder` and `read_config`.
    """
    folder = model_folder(start)
    config = read_config(folder)
    placement = HAND_MADE if config.placement is None else config.placement
    norm = HAND_MADE if config.norm is None else config.norm
    return Start(
        folder=folder,
        norm=read_choice("norm", norm, "op"),
        placement=read_choice("placement", placement, "name"),
    )


def agrees(given: Mapping[str, Any], has: Mapping[str, Any]) -> bool:
    """Whether every key that was given is what the model has."""
    return all(key in has and has[key] == value for key, value in given.items())
