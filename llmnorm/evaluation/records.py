"""Write what an evaluation measured as one JSON, in the run's `eval/` or where the user says.

In a run nothing measured before is overwritten: an equal record is kept, a different one gets a
number. A file that the user names is written as asked.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from llmnorm import safe_files
from llmnorm.errors import DataError, EnvironmentProblem

Record = dict[str, Any]

_NUMBER = (int, float, type(None))
_FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "perplexity": {
        **dict.fromkeys(("loss", "perplexity", "bits_per_byte", "max_documents"), _NUMBER),
        **dict.fromkeys(("data_fingerprint", "split"), (str, type(None))),
    },
    "harness": {"tasks": dict},
}


def to_json(record: Record) -> str:
    """One JSON text; a number that is not finite becomes null, since JSON has no word for it."""
    return json.dumps(_finite(record), indent=2, ensure_ascii=False, allow_nan=False)


def write(record: Record, *, name: str, run: Path | None, out: Path | None) -> Path | None:
    """Write `record` to `out`, or to `run/eval/NAME.json`; without either it is not written.

    Returns:
        The file that holds the record.

    Raises:
        EnvironmentProblem: the file cannot be written.
    """
    if out is None and run is None:
        return None
    text = to_json(record) + "\n"
    try:
        if out is not None:
            path = out
        else:
            assert run is not None
            path = _free(run / "eval", re.sub(r"[^A-Za-z0-9._,=-]+", "_", name), text)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EnvironmentProblem(f"the record cannot be written: {error}") from error
    return path


def check_writable(file: Path) -> None:
    """Fail before the work whose result would go to `file` when that cannot be written.

    Raises:
        EnvironmentProblem: it is a folder, or its folder neither takes it nor can be made.
    """
    folder = next((parent for parent in file.absolute().parents if parent.exists()), file.parent)
    target = file if file.exists() else folder
    if file.is_dir() or not folder.is_dir() or not os.access(target, os.W_OK):
        raise EnvironmentProblem(f"{file} cannot be written; name a file in a folder of yours")


def read(run: Path, kind: str) -> list[Record]:
    """Records of one kind (`perplexity` or `harness`) of a run, oldest first.

    Raises:
        DataError: a file that cannot be read, or is no such record.
    """
    found = sorted(
        (run / "eval").glob(f"{kind}-*.json"), key=lambda path: (path.stat().st_mtime_ns, path)
    )
    return [_checked(path, read_json(path), kind) for path in found]


def read_json(path: Path) -> Record:
    """Read one JSON object.

    Raises:
        DataError: the file cannot be read or holds something else.
    """
    try:
        content = safe_files.read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}; remove or restore it") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a JSON {type(content).__name__}; expected an object")
    return content


def _checked(path: Path, record: Record, kind: str) -> Record:
    wrong = [
        name
        for name, types in _FIELDS[kind].items()
        if name not in record or not isinstance(record[name], types)
    ]
    for task, scores in record["tasks"].items() if kind == "harness" and not wrong else ():
        if not isinstance(scores, dict) or not isinstance(scores.get("higher_is_better"), dict):
            wrong.append(f"tasks.{task}.higher_is_better")
    if wrong:
        raise DataError(
            f"{path} is no record of llmnorm eval {kind}: it lacks {', '.join(wrong)};"
            " remove or restore it"
        )
    return record


def _free(folder: Path, name: str, text: str) -> Path:
    """The first of NAME.json, NAME-2.json, ... that is free or already says the same."""
    path, number = folder / f"{name}.json", 1
    while path.exists() and path.read_bytes() != text.encode():
        number += 1
        path = folder / f"{name}-{number}.json"
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
