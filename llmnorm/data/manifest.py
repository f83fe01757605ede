"""`manifest.json`: what a prepared folder holds, how it was made, and the hash of every file.

The manifest carries no time and no machine path, so the same request gives the same bytes.
Its own `checksum` covers everything else in it. Written by `prepare.py`, read by `prepared.py`.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    field_validator,
)

from ..durable import sha256_of
from ..errors import DataError
from ..safe_files import read_json

MANIFEST_NAME = "manifest.json"
SplitName = Literal["train", "val"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(_Strict):
    """One file of the folder: path relative to it, size in bytes, SHA-256 in hex."""

    name: str
    bytes: NonNegativeInt
    sha256: str

    @field_validator("name")
    @classmethod
    def _inside(cls, value: str) -> str:
        parts = value.split("/")
        if not value.isprintable() or "\\" in value or not {"", ".", ".."}.isdisjoint(parts):
            raise ValueError(f"{value!r:.80} is no path inside the folder")
        return value


class ShardEntry(_Strict):
    """A pair of files: the tokens, and per document (start offset in tokens, UTF-8 bytes)."""

    tokens: PositiveInt
    documents: PositiveInt
    utf8_bytes: NonNegativeInt
    tokens_file: FileEntry
    docs_file: FileEntry


class SplitEntry(_Strict):
    """A split's totals and its shards in reading order."""

    tokens: PositiveInt
    documents: PositiveInt
    utf8_bytes: NonNegativeInt
    shards: tuple[ShardEntry, ...]


class TokenizerEntry(_Strict):
    """The tokenizer saved in the folder's root; `vocab_size` counts added tokens too."""

    origin: str
    vocab_size: PositiveInt
    eos_token: str
    eos_token_id: NonNegativeInt
    files: tuple[FileEntry, ...]


class Manifest(_Strict):
    """All of `manifest.json`. `request` is what was asked for, as `prepare.py` compares it."""

    format: Literal["llmnorm-tokens-1"] = "llmnorm-tokens-1"
    corpus: str
    request: dict[str, Any]
    split_rule: str
    dtype: Literal["uint16", "uint32"]
    tokenizer: TokenizerEntry
    skipped_documents: NonNegativeInt
    splits: dict[SplitName, SplitEntry]
    made_with: dict[str, str]

    @property
    def files(self) -> list[FileEntry]:
        """Every file the manifest vouches for, tokenizer first."""
        shards = [shard for split in self.splits.values() for shard in split.shards]
        return [*self.tokenizer.files, *(f for s in shards for f in (s.tokens_file, s.docs_file))]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over names and hashes of all files: equal fingerprints mean equal data."""
        lines = "".join(f"{entry.sha256}  {entry.name}\n" for entry in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()

    def to_json(self) -> str:
        """The file's text, checksum included."""
        content = self.model_dump(mode="json")
        return json.dumps({**content, "checksum": _checksum(content)}, indent=2) + "\n"


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check `folder/manifest.json`.

    Raises:
        DataError: the folder or its manifest is missing, damaged or of another format.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        what = "has no manifest.json" if folder.is_dir() else "is not a folder"
        raise DataError(
            f"{folder} {what}; expected a folder made by `llmnorm data prepare --out {folder}`"
        )
    try:
        content = read_json(path)
        checksum = content.pop("checksum", None)
        manifest = Manifest.model_validate_json(json.dumps(content))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: {where}: {first['msg']}; prepare the data again") from None
    except RecursionError:
        raise DataError(f"{path}: JSON nested too deeply; prepare the data again") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a manifest ({error}); prepare the data again") from None
    if checksum != _checksum(content):
        raise DataError(
            f"{path}: its checksum does not match its content, so it was damaged or edited; "
            "prepare the data again"
        )
    return manifest


def hash_files(paths: list[Path]) -> list[str]:
    """SHA-256 of many files, on as many threads as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(sha256_of, paths))


def file_entry(folder: Path, name: str, sha256: str | None = None) -> FileEntry:
    """Describe `folder/name` as it is on disk now."""
    path = folder / name
    return FileEntry(name=name, bytes=path.stat().st_size, sha256=sha256 or sha256_of(path))
