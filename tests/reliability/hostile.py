"""What hostile files are made of, and the walls of a trial that reads them.

Every payload would write a canary file if anything in it were run. The walls: 1 GB of memory, no
network, and a watch on what Python reports of itself (commands started, connections, unpickling).
"""

import bz2
import ctypes
import gzip
import hashlib
import io
import json
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reliability.console import Said, check_refusal, limit_memory

from llmnorm.training.manifest import manifest_text

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET: a network with nothing in it
_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "socket.connect", "socket.getaddrinfo")


class Canary:
    """An object whose unpickling writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return _sing, (str(self.path),)


def _sing(path: str) -> str:
    Path(path).write_text("code was run")
    return path


def singing(path: Path) -> str:
    """Python source that writes the canary when it is imported or run."""
    return f"open({str(path)!r}, 'w').write('code was run')\n"


def _torch(value: Any, new: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def _torch_tar(value: Any) -> bytes:
    """The oldest format of torch: a tar of pickles."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            data = pickle.dumps(value)
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _zip(value: Any) -> bytes:
    """A zip whose pickles hide under harmless names."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("archive/data.pkl", "archive/.hidden", "weights.safetensors", "a.npy"):
            archive.writestr(name, pickle.dumps(value))
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def _npy(value: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([value, 1], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def _npz(value: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, tokens=np.array([value, 1], dtype=object))
    return buffer.getvalue()


def _after_safetensors(value: Any) -> bytes:
    """A valid empty safetensors file with a pickle behind it."""
    return (2).to_bytes(8, "little") + b"{}" + pickle.dumps(value)


PICKLES: dict[str, Callable[[Any], bytes]] = {
    "protocol 0": lambda value: pickle.dumps(value, 0),
    "protocol 2": lambda value: pickle.dumps(value, 2),
    "protocol 5": lambda value: pickle.dumps(value, 5),
    "in a list": lambda value: pickle.dumps([{"state": (value, value)}], 4),
    "torch zip": lambda value: _torch({"weight": value}, True),
    "torch legacy": lambda value: _torch({"weight": value}, False),
    "torch tar": _torch_tar,
    "hidden in a zip": _zip,
    "object npy": _npy,
    "object npz": _npz,
    "gzip": lambda value: gzip.compress(pickle.dumps(value)),
    "bz2": lambda value: bz2.compress(pickle.dumps(value)),
    "behind safetensors": _after_safetensors,
}
"""Ways to hide an object that sings."""


def safetensors(tensors: dict[str, np.ndarray], **changed: Any) -> bytes:
    """A safetensors file; `changed` replaces entries of its header."""
    header: dict[str, Any] = {}
    data = b""
    kinds = {"float32": "F32", "float64": "F64", "int64": "I64", "uint8": "U8", "bool": "BOOL"}
    for name, tensor in tensors.items():
        entry = {"dtype": kinds[tensor.dtype.name], "shape": list(tensor.shape)}
        header[name] = {**entry, "data_offsets": [len(data), len(data) + tensor.nbytes]}
        data += tensor.tobytes()
    return with_header(json.dumps({**header, **changed}), data)


def with_header(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header, which claims `length` bytes."""
    text = header.encode() if isinstance(header, str) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def sign_checkpoint(folder: Path) -> None:
    """Make a checkpoint's manifest agree with its files, as an attacker would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("sha256")
    for name in manifest["files"]:
        with suppress(OSError, ValueError):
            manifest["files"][name] = _facts(folder / name, "size")
    (folder / "manifest.json").write_text(manifest_text(manifest))


def sign_data(folder: Path) -> None:
    """Make the manifest of prepared data agree with its files."""
    content = json.loads((folder / "manifest.json").read_text())
    content.pop("checksum")
    for entry in _file_entries(content):
        entry |= _facts(folder / entry["name"], "bytes")
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**content, "checksum": digest}))


def _file_entries(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict) and value.keys() == {"name", "bytes", "sha256"}:
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _file_entries(inner)


def _facts(path: Path, size: str) -> dict[str, Any]:
    data = path.read_bytes()
    return {size: len(data), "sha256": hashlib.sha256(data).hexdigest()}


@contextmanager
def walls(canary: Path) -> Iterator[None]:
    """Run what is inside with 1 GB and no network; fail when the canary sang or a rule was broken.

    Rules cannot be lifted again, so a trial enters once.
    """
    seen: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FORBIDDEN or (event == "pickle.find_class" and "_sing" in arguments):
            seen.append(f"{event}{arguments!r:.200}")

    ctypes.CDLL(None).unshare(_NEW_NETWORK)  # where it is refused the watch alone must do
    sys.addaudithook(watch)
    limit_memory()
    yield
    assert not canary.exists(), "the canary sang: code was run"
    assert not seen, f"broken rules: {seen}"


def check_ended(said: Said, *, may_pass: bool) -> None:
    """A hostile file is refused in plain lines, or has no effect where it is not read at all."""
    if said.code == 0 and may_pass:
        return
    check_refusal(said)


class Crashing(torch.optim.SGD):
    """An optimizer with a mistake in it."""

    def step(self, closure: Any = None) -> None:
        raise ZeroDivisionError("a mistake in the optimizer")
