"""The table of operations that a slot may hold, and the check of their options.

Every operation is one small module built as `Op(dim, **options)`: a norm (`norms.py`) or a gain
(`gains.py`). `NormSpec.build` in `residual.py` reads the table.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

OPERATIONS: dict[str, type[nn.Module]] = {}
_NORMS: list[str] = []


def register_norm(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Enter a norm under `name`: a module built as `Norm(dim, *, scale=1.0, **options)`.

    Raises:
        ValueError: if the name is taken by another class.
    """

    def enter(cls: type[nn.Module]) -> type[nn.Module]:
        _enter(name, cls)
        _NORMS.append(name)
        return cls

    return enter


def register_gain(name: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Enter a constant or a learned gain under `name`: a module built as `Gain(dim, **options)`."""

    def enter(cls: type[nn.Module]) -> type[nn.Module]:
        _enter(name, cls)
        return cls

    return enter


def list_norms() -> list[str]:
    """Names of the registered norms, sorted."""
    return sorted(_NORMS)


def operation(name: str) -> type[nn.Module]:
    """The class registered under `name`.

    Raises:
        ValueError: for an unknown name, with the nearest known ones.
    """
    if name not in OPERATIONS:
        near = get_close_matches(str(name), OPERATIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown norm {name!r}{hint}; known: {', '.join(sorted(OPERATIONS))}")
    return OPERATIONS[name]


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError if the operation `name` has no such option or no such kind of value."""
    parameters = inspect.signature(operation(name).__init__).parameters
    known = {key: p for key, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    for key, value in options.items():
        if key not in known:
            allowed = ", ".join(known) or "none"
            raise ValueError(f"{name} has no option {key!r}; its options: {allowed}")
        check_kind(f"{name}.{key}", value, like=known[key].default)
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in options:
            raise ValueError(f"{name} needs the option {key!r}")


def check_kind(name: str, value: Any, *, like: Any) -> None:
    """Raise ValueError unless `value` is of the kind of a default: text, true/false or a number."""
    kinds: dict[type, tuple[Any, str]] = {bool: (bool, "true or false"), str: (str, "text")}
    kind, words = kinds.get(type(like), (int | float, "a number"))
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{name} is {value!r}; expected {words}")
    if not isinstance(value, str) and not _representable(value):
        raise ValueError(f"{name} is {value!r}; expected a finite number that torch can hold")


def check_positive(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a finite number above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and value > 0 and _representable(value)):
        raise ValueError(f"{name} is {value!r}; expected a number above 0")


def _representable(number: float) -> bool:
    """Whether torch can hold a number: a finite float, or an integer of 64 bits."""
    return math.isfinite(number) if isinstance(number, float) else abs(number) < 2**63


def check_mapping(name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a mapping."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {value!r}; expected a mapping")


def read_choice(field: str, value: Any, key: str) -> dict[str, Any]:
    """Read a field that is a name, or a mapping with the name under `key` beside options.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(value, str):
        return {key: value}
    if not isinstance(value, Mapping) or not isinstance(value.get(key, ""), str):
        raise ValueError(f"{field} is {value!r}; expected a name, or a mapping with `{key}`")
    return dict(value)


def options_at(
    name: str, options: Mapping[str, Any], kind: str, hidden_size: int
) -> tuple[str, dict[str, Any]]:
    """Operation and options of a norm at one kind of site (`attn`, `mlp`, `final`) and width.

    Defaults are written out, so that a stored spec stays right if they change. Only norms that
    define `options_at` resolve more than that: DyT's alpha depends on site and width, BHyT's final
    norm is another operation (`op` among the options).
    """
    resolve = getattr(operation(name), "options_at", None)
    resolved = dict(options) if resolve is None else resolve(dict(options), kind, hidden_size)
    name = resolved.pop("op", name)
    check_options(name, resolved)
    return name, {**_defaults(name), **resolved}


def _defaults(name: str) -> dict[str, Any]:
    parameters = inspect.signature(operation(name).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _enter(name: str, cls: type[nn.Module]) -> None:
    if name in OPERATIONS and OPERATIONS[name].__qualname__ != cls.__qualname__:
        raise ValueError(f"{name!r} is already registered by {OPERATIONS[name].__qualname__}")
    OPERATIONS[name] = cls


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """float32, or the input's precision if that is higher."""
    return torch.promote_types(x.dtype, torch.float32)
