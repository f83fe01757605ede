"""Write what an evaluation measured as one JSON, in the run's `eval/` or where the user says.

In a run nothing measured before is overwritten: an equal record is kept, a different one gets a
number. A file that the user names is written as asked.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from llmnorm.errors import DataError

Record = dict[str, Any]


def to_json(record: Record) -> str:
    """One JSON text; a number that is not finite becomes null, since JSON has no word for it."""
    return json.dumps(_finite(record), indent=2, ensure_ascii=False, allow_nan=False)


def write(record: Record, *, name: str, run: Path | None, out: Path | None) -> Path | None:
    """Write `record` to `out`, or to `run/eval/NAME.json`; without either it is not written.

    Returns:
        The file that holds the record.
    """
    if out is None and run is None:
        return None
    text = to_json(record) + "\n"
    if out is not None:
        path = out
    else:
        assert run is not None
        path = _free(run / "eval", re.sub(r"[^A-Za-z0-9._,=-]+", "_", name), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def read(run: Path, kind: str) -> list[Record]:
    """Records of one kind (`perplexity` or `harness`) of a run, oldest first."""
    found = sorted(
        (run / "eval").glob(f"{kind}-*.json"), key=lambda path: (path.stat().st_mtime_ns, path)
    )
    return [read_json(path) for path in found]


def read_json(path: Path) -> Record:
    """Read one JSON object.

    Raises:
        DataError: the file cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}; remove or restore it") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a JSON {type(content).__name__}; expected an object")
    return content


def _free(folder: Path, name: str, text: str) -> Path:
    """The first of NAME.json, NAME-2.json, ... that is free or already says the same."""
    path, number = folder / f"{name}.json", 1
    while path.exists() and path.read_text(encoding="utf-8") != text:
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
