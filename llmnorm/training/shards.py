"""Shards: safetensors files written in one pass, hashed on the way and forced to the disk.

safetensors' own `save_file` holds Python's lock while it copies and writes, which would stop the
training that goes on meanwhile, and needs a second pass for the hash. The format is a length, a
JSON header and the tensors' bytes; a test compares the files with the library's.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmnorm.durable import FileFacts, write_hashed

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileFacts:
    """Write a new safetensors file, force it to the disk, and return its size and hash.

    Tensors may lie anywhere; one at a time is brought to the CPU.

    Raises:
        OSError: naming the file, when the disk refuses.
    """
    widest_first = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    return write_hashed(path, _parts({name: tensors[name] for name in widest_first}))


def _parts(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    header, start = {}, 0
    for name, tensor in tensors.items():
        stop = start + tensor.nbytes
        kind = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = {**kind, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor is aligned
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data
