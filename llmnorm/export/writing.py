"""Write a folder that `from_pretrained` reads: config, weights, tokenizer, generation settings.

`custom.py` writes the folder of a model that no class holds, with the same parts.
"""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from llmnorm.durable import follow_umask
from llmnorm.errors import CheckpointError, ConfigError
from llmnorm.evaluation.loading import Loaded
from llmnorm.export.fitting import Fit

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_INDEX = "model.safetensors.index.json"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SPARE_BYTES = 64 * 2**20
"""Room beside the weights: tokenizer, config, card."""


def write_folder(
    folder: Path, fit: Fit, source: Loaded, dtype: torch.dtype, shard_size: str
) -> None:
    """Write a model as the class that holds it.

    Args:
        folder: an empty folder.
        fit: the class, and the form that it holds.
        source: where tokenizer and generation settings are taken from.
        dtype: what the weights are cast to, once, from float64.
        shard_size: the most bytes of a file, such as `5GB`.

    Raises:
        ConfigError: if a value does not fit in `dtype`.
        CheckpointError: if a fold gave a value that is no number.
        OSError: if the disk is full, or refuses.
    """
    write_weights(folder, fit.host.write(fit.form, dtype), dtype, shard_size)
    config = fit.host.config(fit.form, dtype)
    write_companions(folder, config, source)


def write_weights(
    folder: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, shard_size: str
) -> None:
    """Cast float64 tensors, one file's at a time, and write them as safetensors; as `write_folder`.

    Several files get an index.
    """
    check_values(tensors, dtype)
    shapes = {n: torch.empty(t.shape, dtype=dtype, device="meta") for n, t in tensors.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=shard_size)
    check_room(folder, sum(shape.nbytes for shape in shapes.values()))
    for file, names in split.filename_to_tensors.items():
        cast = {name: tensors[name].to(dtype).contiguous() for name in names}
        try:
            save_file(cast, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(str(error)) from error
        follow_umask(folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_companions(folder: Path, config: PreTrainedConfig, source: Loaded) -> None:
    """Write config, tokenizer with its chat template, and generation settings.

    Ids of special tokens that the model does not say are the tokenizer's.

    Raises:
        CheckpointError: if the source's generation settings contradict themselves.
        OSError: if the disk is full, or refuses.
    """
    generation = copy.deepcopy(source.model.generation_config)
    for holder in (config, generation):
        for name in _TOKENS:
            if getattr(holder, name, None) is None and source.tokenizer is not None:
                setattr(holder, name, getattr(source.tokenizer, name))
    config.save_pretrained(folder)
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(folder)
    try:
        generation.save_pretrained(folder)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{source.source.location}: generation_config.json cannot be kept: {reason}"
        ) from error


def check_values(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Refuse values that a cast to `dtype` would lose; as `write_folder`."""
    most = torch.finfo(dtype).max
    for name, tensor in tensors.items():
        greatest = float(tensor.abs().max()) if tensor.numel() else 0.0
        if not greatest < float("inf"):  # nan too
            raise CheckpointError(
                f"{name} has values that are not finite once the model is folded; "
                "export an earlier checkpoint, or --target custom"
            )
        if greatest > most:
            word = str(dtype).removeprefix("torch.")
            raise ConfigError(
                f"{name} reaches {greatest:.4g}, beyond the {most:.5g} of {word}; use --dtype bf16"
            )


def check_room(folder: Path, need: int) -> None:
    """Raise OSError where the disk cannot take `need` bytes of weights and what is beside them."""
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < need + _SPARE_BYTES:
        raise OSError(
            f"{need + _SPARE_BYTES:,} bytes are needed and {disk.free:,} are free; make room, or"
            " choose another disk"
        )


def size_of(folder: Path) -> tuple[int, int]:
    """The number of a folder's files of weights, and their bytes."""
    files = list(folder.glob("*.safetensors"))
    return len(files), sum(file.stat().st_size for file in files)
