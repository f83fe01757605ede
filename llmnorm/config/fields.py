"""Kinds of values in a run file, and the base of its sections."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from llmnorm.config.document import MAX_INTEGER


def _path(value: object) -> Path:
    """A path as text (`~` is the home folder); relative ones mean the current directory."""
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError("expected a path")
    if len(os.fsencode(value)) > 4096 or any(len(os.fsencode(p)) > 255 for p in value.split("/")):
        raise ValueError("longer than any path can be")
    if "\n" in value:
        raise ValueError("expected a path in one line")
    return Path(os.path.expanduser(value))


def _count_or_fraction(value: object) -> int | float:
    """A count of steps (a whole number from 0) or a fraction of the run (below 1)."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INTEGER:
        return value
    if isinstance(value, float) and 0 <= value < 1:
        return value
    raise ValueError("expected a count of steps (a whole number) or a fraction of the run below 1")


LocalPath = Annotated[Path, BeforeValidator(_path)]
Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]
Positive = Annotated[int, Field(ge=1, le=MAX_INTEGER)]
Size = Annotated[int, Field(ge=1, le=2**24)]  # of batches and sequences; beyond is a slip
CountOrFraction = Annotated[int | float, BeforeValidator(_count_or_fraction)]


class Section(BaseModel):
    """Base of all sections: strict types, no unknown keys, no NaN or infinity, immutable."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True
    )
