"""Read YAML as plain data, with the line of every key, and refuse what a run file does not need.

The document is read event by event instead of through a YAML constructor, so tags, anchors and
merge keys have no meaning to exploit: they are errors. Scalars follow the YAML 1.2 core schema,
the one people expect: `1e-3` is a number, `no` and `on` are text, `010` is text and never octal.
Read `load.py` next: it merges a document with the command line.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from llmnorm.errors import ConfigError

MAX_BYTES = 64 * 1024
MAX_DEPTH = 16
MAX_INTEGER = 2**63 - 1

KeyPath = tuple[str | int, ...]

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")


@dataclass
class Document:
    """One YAML document: its value, and the 1-based line on which each key or item stands."""

    value: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)


def read_document(text: str, source: str) -> Document:
    """Read one YAML document from `text`; `source` names it in errors (a file, a flag).

    Raises:
        ConfigError: naming source and line, for text that is too long, not YAML, nested deeper
            than 16, holds tags, anchors, aliases, duplicate keys, several documents, or numbers
            that are not finite or do not fit 64 bits.
    """
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise ConfigError(f"{source}: longer than {MAX_BYTES} bytes, which no run file needs")
    try:
        return _Reader(text, source).document()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark is not None else source
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        raise ConfigError(f"{where}: not valid YAML ({what}); quote the text or fix it") from None


def read_scalar(text: str) -> str | int | float | bool | None:
    """Resolve an unquoted scalar by the YAML 1.2 core schema (plus `_` between digits).

    Raises:
        ValueError: for numbers that are not finite or do not fit 64 bits.
    """
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        if len(text) > 40 or abs(int(text)) > MAX_INTEGER:
            raise ValueError(f"{text[:40]} does not fit a 64-bit integer")
        return int(text)
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not a finite number")
    if _FLOAT.fullmatch(text) and not _LEADING_ZERO.fullmatch(text):
        number = float(text)
        if number in (float("inf"), float("-inf")):
            raise ValueError(f"{text[:40]} is not a finite number")
        return number
    return text


class _Reader:
    """Turns parser events into dicts, lists and scalars. Depth is capped before each descent."""

    def __init__(self, text: str, source: str) -> None:
        self.source = source
        self.lines: dict[KeyPath, int] = {}
        self.events: Iterator[yaml.Event] = iter(yaml.parse(text, Loader=yaml.SafeLoader))

    def document(self) -> Document:
        value = None
        documents = 0
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    self.refuse(event, "a second document (---); a run file holds one")
            elif isinstance(event, yaml.NodeEvent):
                value = self.node(event, ())
        return Document(value, self.lines)

    def refuse(self, event: yaml.Event, problem: str) -> NoReturn:
        raise ConfigError(f"{self.source}:{_line(event)}: {problem}")

    def node(self, event: yaml.Event, path: KeyPath) -> Any:
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event)
        if not isinstance(event, yaml.CollectionStartEvent):
            self.refuse(event, "aliases are refused; repeat the value")
        self.check_plain(event)
        if len(path) >= MAX_DEPTH:
            self.refuse(event, f"nested deeper than {MAX_DEPTH}, which no run file needs")
        mapping = isinstance(event, yaml.MappingStartEvent)
        return self.mapping(path) if mapping else self.sequence(path)

    def mapping(self, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.key(event)
            if key in result:
                first = self.lines[(*path, key)]
                self.refuse(event, f"the key {key!r:.80} stands twice (first in line {first})")
            self.lines[(*path, key)] = _line(event)
            result[key] = self.node(next(self.events), (*path, key))
        return result

    def sequence(self, path: KeyPath) -> list[Any]:
        result: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            item = (*path, len(result))
            self.lines[item] = _line(event)
            result.append(self.node(event, item))
        return result

    def key(self, event: yaml.Event) -> str:
        if not isinstance(event, yaml.ScalarEvent):
            self.refuse(event, "a key must be plain text")
        if event.value == "<<" and event.implicit[0]:
            self.refuse(event, "merge keys (<<) are refused; repeat the values")
        self.check_plain(event)
        return str(event.value)

    def scalar(self, event: yaml.ScalarEvent) -> str | int | float | bool | None:
        self.check_plain(event)
        text = str(event.value)
        if not event.implicit[0]:
            if any(ord(character) < 32 and character != "\n" for character in text):
                self.refuse(event, f"control characters in {text!r:.80}")
            if any("\ud800" <= character <= "\udfff" for character in text):
                self.refuse(event, f"half a character, which is no Unicode, in {text!r:.80}")
            return text
        try:
            return read_scalar(text)
        except ValueError as error:
            self.refuse(event, str(error))

    def check_plain(self, event: yaml.ScalarEvent | yaml.CollectionStartEvent) -> None:
        if event.anchor is not None:
            self.refuse(event, f"the anchor &{event.anchor:.80} is refused; repeat the value")
        if event.tag is not None:
            self.refuse(event, f"the tag {event.tag:.80} is refused; a run file is plain data")


def _line(event: yaml.Event) -> int:
    """The 1-based line on which the event stands."""
    return event.start_mark.line + 1 if event.start_mark else 1
