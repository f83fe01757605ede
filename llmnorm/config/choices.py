"""Ask the model code whether the names, options and fields of a run file's model section exist."""

import importlib
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import llmnorm.build
from llmnorm.modeling.operations import list_norms
from llmnorm.placements import list_placements
from llmnorm.resources import shape_folder, suggest

if TYPE_CHECKING:
    from llmnorm.config.model_section import NormChoice, PlacementChoice


def import_module(name: str) -> None:
    """Import a module that registers norms or placements; raise ValueError if that fails.

    It is looked for as Python does: installed, or in a folder of PYTHONPATH.
    """
    try:
        importlib.import_module(name)
    except Exception as error:  # whatever the module's own code raises
        reason = " ".join(str(error).split())
        raise ValueError(
            f"importing {name} fails ({type(error).__name__}: {reason}); "
            "install it, or put its folder on PYTHONPATH"
        ) from error


def check_preset(value: str) -> str:
    """Return `value` when it names a preset or a folder with config.json, else raise ValueError."""
    shape_folder(value)
    return value


def check_norm(value: str) -> str:
    """Return `value` when a norm of this name is registered, else raise ValueError."""
    return _check_name(value, list_norms(), "norm")


def check_placement(value: str) -> str:
    """Return `value` when a placement of this name is registered, else raise ValueError."""
    return _check_name(value, list_placements(), "placement")


def check_build(key: str, value: Any, earlier: Mapping[str, Any]) -> None:
    """Build the model's config with one more of norm, placement and overrides than before.

    `earlier` holds the keys that proved right, so what fails now is due to `key`.

    Raises:
        ValueError: with the message of the build.
    """
    if earlier.get("preset") is None:
        return
    if key == "overrides":
        _check_overrides(value)
    parts = {"norm": None, "placement": None, "overrides": {}} | dict(earlier) | {key: value}
    for other in ("imports", "start"):
        parts.pop(other, None)
    problem = _problem(parts)
    if problem is not None and key == "overrides":
        without = ((name, {k: v for k, v in value.items() if k != name}) for name in value)
        guilty = [name for name, rest in without if _problem(parts | {key: rest}) is None]
        if len(guilty) == 1 and guilty[0] not in problem:
            problem = f"{guilty[0]}: {problem}"
    if problem is not None:
        raise ValueError(problem)


def build_arguments(
    preset: str,
    norm: "NormChoice | None",
    placement: "PlacementChoice | None",
    overrides: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the keyword arguments of `llmnorm.build_config`; None leaves its default."""
    arguments: dict[str, Any] = {"base": preset, **overrides}
    for name, choice in (("norm", norm), ("placement", placement)):
        if choice is not None:
            arguments[name] = choice.model_dump()
    return arguments


def _problem(parts: Mapping[str, Any]) -> str | None:
    """What the build says against these parts of the model section; None when it succeeds."""
    with without_warnings():
        try:
            llmnorm.build.build_config(**build_arguments(**parts))
        except ValueError as error:
            return re.sub(r"\s+", " ", str(error))
        except Exception as error:  # a value of a wrong kind may fail anywhere in transformers
            return f"no model can be built from this ({type(error).__name__}: {error})"
    return None


def _check_name(value: str, known: list[str], kind: str) -> str:
    if value not in known:
        raise ValueError(f"no {kind} has this name{suggest(value, known)}")
    return value


def _check_overrides(overrides: Mapping[str, Any]) -> None:
    for name, key in (("base", "preset"), ("norm", "norm"), ("placement", "placement")):
        if name in overrides:
            raise ValueError(f"{name} has its own key: model.{key}")


@contextmanager
def without_warnings() -> Iterator[None]:
    """Leave the build's warnings to the build that the run itself does."""
    log = logging.getLogger(llmnorm.build.__name__)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
