"""From a YAML file and `--section.key VALUE` overrides to one validated `RunConfig`.

Precedence: defaults < file < command line. Overrides are merged into the file's mapping before the
one validation, so both give the same errors, all at once, each with its origin.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llmnorm.config.document import MAX_BYTES, KeyPath, read_document
from llmnorm.config.models import RunConfig
from llmnorm.config.problems import MAX_LINES, explain, key_name, leaves, one_line, show
from llmnorm.errors import ConfigError
from llmnorm.resources import config_file

logger = logging.getLogger(__name__)

# A key that chooses something, and the keys beside it that belong to what was chosen (None: all).
_CHOICES: dict[KeyPath, tuple[str, ...] | None] = {
    ("model", "norm", "op"): None,
    ("model", "placement", "name"): None,
    ("optimizer", "name"): ("options",),
    ("schedule", "name"): ("decay_steps",),
}


def load_run_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, merge and check a run file.

    Args:
        path: a YAML file or the name of a recipe (`quickstart`, `pretrain/130m`); None for none.
        overrides: command-line words, `--section.key VALUE` or `--section.key=VALUE`; VALUE is
            read as YAML. Relative paths mean the current directory, in the file too.

    Raises:
        ConfigError: with one line for each thing that is wrong.
    """
    draft = _Draft()
    if path is not None:
        draft.read_file(config_file(str(path)))
    draft.apply(overrides)
    return draft.validate()


@dataclass
class _Draft:
    """The mapping before validation, where each key came from, and what is wrong so far."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    source: str = "command line"

    def read_file(self, path: Path) -> None:
        self.source = str(path)
        try:
            with path.open("rb") as file:
                text = file.read(MAX_BYTES + 1).decode("utf-8-sig")
            document = read_document(text, self.source)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from None
        except ConfigError as error:
            raise ConfigError(one_line(str(error))) from None
        if not isinstance(document.value, dict | None):
            raise ConfigError(f"{path}: expected sections of keys, found {show(document.value)}")
        self.values = document.value or {}
        self.origins = {key: f"{path}:{line}" for key, line in document.lines.items()}

    def apply(self, words: Sequence[str]) -> None:
        """Merge the overrides; options of a norm or placement that is replaced are dropped."""
        changes: list[tuple[KeyPath, str, Any]] = []
        for flag, text in self._pairs(words):
            try:
                value = read_document(text, flag).value
            except ConfigError as error:
                self.problems.append(str(error))
                continue
            changes.append((tuple(flag.removeprefix("--").split(".")), flag, value))
        for path, flag, value in changes:
            if path in _CHOICES:
                self._drop_options(path, flag, value)
        for path, flag, value in changes:
            self._set(path, flag, value)

    def _pairs(self, words: Sequence[str]) -> list[tuple[str, str]]:
        pairs: list[tuple[str, str]] = []
        rest = list(words)
        while rest:
            word = rest.pop(0)
            flag, has_value, text = word.partition("=")
            if not word.startswith("--") or flag == "--":
                self.problems.append(f"{show(word)}: expected --section.key VALUE")
            elif has_value:
                pairs.append((flag, text))
            elif rest and not rest[0].startswith("--"):
                pairs.append((flag, rest.pop(0)))
            else:
                self.problems.append(f"{flag}: needs a value, as in {flag} VALUE")
        return pairs

    def _drop_options(self, path: KeyPath, flag: str, new: Any) -> None:
        section: Any = self.values
        for part in path[:-1]:
            section = section.get(part) if isinstance(section, dict) else None
        default = leaves(RunConfig)[path].default
        if not isinstance(section, dict) or section.get(str(path[-1]), default) == new:
            return
        old = section.get(str(path[-1]), default)
        owned = _CHOICES[path] or tuple(section)
        dropped = {key: section.pop(key) for key in owned if key in section and key != path[-1]}
        if dropped:
            options = ", ".join(f"{key}={show(value)}" for key, value in dropped.items())
            logger.warning(
                "%s %s replaces %s: its options (%s) are dropped", flag, new, old, options
            )

    def _set(self, path: KeyPath, flag: str, value: Any) -> None:
        target = self.values
        for depth, part in enumerate(path[:-1], start=1):
            if target.get(str(part)) is None:
                target[str(part)] = {}
            target = target[str(part)]
            if not isinstance(target, dict):
                above = key_name(path[:depth])
                self.problems.append(f"{flag}: {above} is {show(target)}, which has no keys")
                return
        target[str(path[-1])] = value
        self.origins = {k: v for k, v in self.origins.items() if k[: len(path)] != path}
        self.origins[path] = flag

    def validate(self) -> RunConfig:
        """Check everything once; missing sections count as empty, so that their keys are named."""
        sections = RunConfig.model_fields
        empty = [name for name in sections if self.values.get(name) is None]
        filled = self.values | {name: {} for name in empty}
        try:
            config = RunConfig.model_validate(filled)
        except ValidationError as found:
            self.problems += map(self.line, found.errors(include_url=False))
        if self.problems:
            lines = list(dict.fromkeys(one_line(line) for line in self.problems))
            more = [f"and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
            raise ConfigError("\n".join(lines[:MAX_LINES] + more))
        return config

    def line(self, error: ErrorDetails) -> str:
        """Origin and explanation; a flag that is the key itself is not repeated."""
        text, key = explain(error, RunConfig), key_name(error["loc"])
        origin = self.origin(error["loc"], text)
        return f"--{text}" if origin == f"--{key}" else f"{origin}: {text}"

    def origin(self, path: KeyPath, text: str) -> str:
        """Where `path` was given: a key under it that `text` names, else itself, else above it."""
        under = {k: o for k, o in self.origins.items() if k[: len(path)] == path and k != path}
        named = text.removeprefix(key_name(path)).partition(";")[0]
        for key, origin in under.items():
            if re.search(rf"(?<!\w){re.escape(str(key[-1]))}(?!\w)", named):
                return origin
        for depth in range(len(path), 0, -1):
            if path[:depth] in self.origins:
                return self.origins[path[:depth]]
        return next(iter(under.values()), self.source)
