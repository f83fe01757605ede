"""The facts our own suite demands of every scheme, for schemes registered anywhere.

    from llmnorm.testing import check_scheme
    print(check_scheme("my_placement", norm="my_norm"))

`CHECKS` lists them; each is a function of a `Scheme` in `checks.py`, `promises.py` or `saving.py`.
pytest is not needed. Our tests run the same functions over all norms and placements.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llmnorm.errors import LlmNormError
from llmnorm.testing.checks import (
    check_bfloat16,
    check_build,
    check_causality,
    check_checkpointing,
    check_compilation,
    check_documentation,
    check_generation,
    check_gradients,
)
from llmnorm.testing.promises import check_promises
from llmnorm.testing.saving import check_saving
from llmnorm.testing.scheme import SHAPE, TOLERANCE, CheckError, Scheme, find_scheme, tokens

__all__ = [
    "CHECKS",
    "SHAPE",
    "TOLERANCE",
    "CheckError",
    "Report",
    "Scheme",
    "check_scheme",
    "find_scheme",
    "run_check",
    "tokens",
]

CHECKS: dict[str, Callable[[Scheme], str]] = {
    "documentation": check_documentation,
    "build": check_build,
    "gradients": check_gradients,
    "bfloat16": check_bfloat16,
    "causality": check_causality,
    "generation": check_generation,
    "checkpointing": check_checkpointing,
    "compilation": check_compilation,
    "promises": check_promises,
    "saving": check_saving,
}


@dataclass(frozen=True)
class Report:
    """What each check saw; printed as one line a check."""

    scheme: str
    seen: Mapping[str, str]

    def __str__(self) -> str:
        return "\n".join([self.scheme, *(f"  {name}: {seen}" for name, seen in self.seen.items())])


def check_scheme(
    name: str | Mapping[str, Any], *, norm: str | Mapping[str, Any] | None = None, **options: Any
) -> Report:
    """Run every check on a scheme.

    Args:
        name: a placement, or a norm (which is then checked with pre_ln), registered anywhere; as in
            `build_config` a mapping carries options. A name of both means the placement.
        norm: norm of the placement; by default rmsnorm, or the first that the placement accepts.
        **options: further arguments of `build_config`; shape fields replace those of `SHAPE`, whose
            vocabulary may not shrink.

    Raises:
        CheckError: naming the first check that fails, what was seen and what was expected.
        ConfigError: for a name that is not registered.
    """
    scheme = find_scheme(name, norm=norm, **options)
    return Report(str(scheme), {check: run_check(check, scheme) for check in CHECKS})


def run_check(check: str, scheme: Scheme) -> str:
    """Run one check of `CHECKS`; returns what it saw.

    Raises:
        CheckError: as `check_scheme`.
    """
    try:
        return CHECKS[check](scheme)
    except CheckError as error:
        raise CheckError(f"{scheme}: {check}: {error}") from error
    except (LlmNormError, RuntimeError, ValueError, TypeError) as error:
        line = " ".join(str(error).split())
        raise CheckError(
            f"{scheme}: {check}: saw {type(error).__name__} ({line}); expected none"
        ) from error
