"""Look at a model's files before transformers reads them: no code, no bombs, nothing from outside.

A model comes from anywhere. Its weights must be safetensors (pickled ones run code, so they are not
read at all), every file must lie in its folder, and its config.json must not name code or kernels
to be fetched. `loading.py` is the user.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, cached_files

from llmnorm.errors import CheckpointError
from llmnorm.safe_files import check_inside, check_name, check_safetensors, read_json

_MOST_LAYERS = 10_000  # ten times the deepest model published
_KERNEL_KEYS = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_IN_SHARDS = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_OWN_KERNEL = re.compile(r"[a-z0-9_]+")  # sdpa; what is fetched is called OWNER/NAME


def screen_config(location: str) -> Path:
    """Return the folder of a model's config.json after looking at it; a hub name is downloaded.

    Raises:
        ValueError: it is damaged, or asks for kernels by a hub name or for absurdly many layers.
        OSError: there is none.
    """
    path = Path(str(cached_file(location, "config.json")))
    check_inside(path, path.parent)
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; expected an object")
    for key, value in _entries(content):
        if _KERNEL_KEYS.fullmatch(key) and isinstance(value, str):
            if not _OWN_KERNEL.fullmatch(value):
                raise ValueError(f"{path}: {key} names {value!r:.80}, code from outside; remove it")
        elif key == "transformers_weights" and value is not None:
            check_name(value)
        elif "layer" in key and isinstance(value, int) and value > _MOST_LAYERS:
            raise ValueError(f"{path}: {key} is {value}; expected at most {_MOST_LAYERS}")
    return path.parent


def screen_weights(location: str, folder: Path) -> None:
    """Look at every weight file of a model; those of a hub name are downloaded into `folder`.

    Raises:
        CheckpointError: there are no safetensors weights, one cannot be trusted, or the index
            names a file elsewhere.
    """
    try:
        index = cached_file(
            location, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False
        )
        names = [SAFE_WEIGHTS_NAME] if index is None else _shards(Path(str(index)))
        cached_files(location, names, _raise_exceptions_for_missing_entries=False)
        found = sorted(folder.glob("*.safetensors"))
        for path in found:
            if _IN_SHARDS.fullmatch(path.name):
                raise ValueError(f"{path} is a part of a distributed checkpoint; export it first")
            check_inside(path, folder)
            check_safetensors(path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{location}: the weights cannot be loaded: {reason}") from error
    if not found:
        raise CheckpointError(
            f"{location}: the weights cannot be loaded: there are no *.safetensors; pickled weights"
            " (.bin, .pt) can run code and are not read, convert them"
        )


def _shards(index: Path) -> list[str]:
    """The files that an index names, each a plain name."""
    check_inside(index, index.parent)
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    return sorted({check_name(name) for name in weight_map.values()})


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of nested objects with its value."""
    if isinstance(value, dict):
        yield from value.items()
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            yield from _entries(inner)
