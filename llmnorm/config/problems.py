"""Turn pydantic's errors into lines that say what was seen, what was expected, what to do."""

import difflib
from typing import Any

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from llmnorm.config.document import KeyPath

MAX_LINE = 300
MAX_LINES = 50

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list, like [a, b]",
    "dict_type": "a section of keys",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
    "finite_number": "a finite number",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "too_short": "a list of at least {min_length} items",
    "too_long": "a list of at most {max_length} items",
}


def show(value: object) -> str:
    """Return `value` as a run file would spell it, on one line, at most 80 characters long."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return _shorten(repr(value))


def key_name(path: KeyPath) -> str:
    """Return `path` as a dotted key, as on the command line."""
    return _shorten(".".join(str(part) for part in path))


def _shorten(text: str) -> str:
    text = text[:81].encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 80 else text[:77] + "..."


def explain(error: ErrorDetails, root: type[BaseModel]) -> str:
    """Return one line for `error`, found while validating `root`; it begins with the key."""
    kind, path, seen = error["type"], error["loc"], error["input"]
    if kind in ("missing", "extra_forbidden") and (place := _item(path)):
        what = "is required there" if kind == "missing" else "is not a key there"
        return f"{key_name(place)}: {path[-1]!s:.40} {what}; --help shows what an item holds"
    if kind == "missing":
        key = key_name(path)
        return f"{key} is required; write it in the run file or give --{key} VALUE"
    if kind == "extra_forbidden":
        return f"{key_name(path)} is not a key of a run file; {_nearest_key(path, root)}"
    context: dict[str, Any] = error.get("ctx") or {}
    if kind == "literal_error":
        expected = context["expected"].replace("'", "").replace("True", "true")
        expected = expected.replace("False", "false")
        return (
            f"{key_name(path)}: expected {expected}, found {show(seen)}{_nearest(seen, expected)}"
        )
    if kind == "value_error":
        found = "" if seen is None or isinstance(seen, dict) else f", found {show(seen)}"
        return f"{key_name(path)}: {context['error']}{found}"
    bounds = {name: f"{v:g}" if isinstance(v, float) else v for name, v in context.items()}
    expected = _EXPECTED.get(kind, error["msg"]).format(**bounds)
    return f"{key_name(path)}: expected {expected}, found {show(seen)}"


def _item(path: KeyPath) -> KeyPath:
    """The part of `path` that names an item of a list; empty if there is none."""
    return path[: max((i + 1 for i, part in enumerate(path) if isinstance(part, int)), default=0)]


def one_line(text: str, most: int = MAX_LINE) -> str:
    """Return `text` without line breaks and control characters, at most `most` characters long."""
    text = text[: most + 1]
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= most else text[: most - 3] + "..."


def leaves(model: type[BaseModel], prefix: KeyPath = ()) -> dict[KeyPath, Any]:
    """Return every key of `model` that is not a section, with its pydantic field."""
    found: dict[KeyPath, Any] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= leaves(kind, (*prefix, name))
        else:
            found[(*prefix, name)] = field
    return found


def _nearest_key(path: KeyPath, root: type[BaseModel]) -> str:
    """Suggest the nearest key: in the same section first, then of any section by its last name."""
    known = {".".join(str(part) for part in leaf): leaf for leaf in leaves(root)}
    section = ".".join(str(part) for part in path[:-1])
    name = str(path[-1])
    siblings = {text.removeprefix(f"{section}."): text for text in known} if section else {}
    siblings = {n: t for n, t in siblings.items() if t.startswith(f"{section}.") and "." not in n}
    by_name = {str(leaf[-1]): text for text, leaf in known.items()}
    sections = {str(leaf[0]): str(leaf[0]) for leaf in known.values()}
    pools = [siblings] if section else [sections]
    for pool in [*pools, by_name]:
        cutoff = 0.5 if pool is siblings else 0.6  # `rl` for lr
        near = difflib.get_close_matches(name, list(pool), n=1, cutoff=cutoff)
        if near:
            return f"did you mean {pool[near[0]]}?"
    return f"known here: {', '.join(siblings or sections)}"


def _nearest(seen: object, expected: str) -> str:
    options = expected.replace(" or ", ", ").split(", ")
    near = difflib.get_close_matches(str(seen), options, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""
