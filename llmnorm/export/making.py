"""Make folders whole or not at all, and write those whose models bring llmnorm's own code."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.dynamic_module_utils import custom_object_save

from llmnorm.durable import sync
from llmnorm.errors import ConfigError, EnvironmentProblem
from llmnorm.evaluation.loading import Loaded
from llmnorm.evaluation.quiet import quiet
from llmnorm.export.form import HEAD
from llmnorm.export.writing import write_companions, write_weights
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM
from llmnorm.modeling.travel import foreign_sources, write_sources

_SHARD_SIZE = "5GB"


@contextmanager
def making(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, which becomes `out` when the block ends well.

    Raises:
        ConfigError: `out` exists and is not an empty folder, or is no name.
        EnvironmentProblem: the disk refuses.
    """
    if out.name in ("", ".."):
        raise ConfigError(f"--out {out} is a place, not a name; name a new folder in it")
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out} exists already; name a new folder")
    hidden = out.with_name(f".{out.name}.writing")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir()
        yield hidden
        for path in [*hidden.iterdir(), hidden]:
            sync(path)
        if out.exists():
            out.rmdir()
        hidden.rename(out)
        sync(out.parent)
    except OSError as error:
        raise EnvironmentProblem(f"--out {out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def write_model(
    folder: Path, model: LlmNormForCausalLM, source: Loaded, dtype: torch.dtype
) -> None:
    """Write config, code and weights of a float64 model, tokenizer and generation settings.

    Args:
        folder: an empty folder.
        model: what to write.
        source: where tokenizer and generation settings are taken from.
        dtype: what the weights are cast to.

    Raises:
        ConfigError: a value does not fit in `dtype`.
        EnvironmentProblem: there is no room.
    """
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors[f"{HEAD}.weight"]
    write_with_code(folder, model, tensors, source, dtype, _SHARD_SIZE)


def write_with_code(
    folder: Path,
    model: LlmNormForCausalLM,
    tensors: Mapping[str, torch.Tensor],
    source: Loaded,
    dtype: torch.dtype,
    shard_size: str,
) -> None:
    """Write tensors as the weights of a model, which may be on `meta`, with the code that runs it.

    Arguments and errors as `write_folder`.
    """
    config = model.config
    config.dtype, config.architectures = dtype, [type(model).__name__]
    sources = foreign_sources(model)
    write_weights(folder, tensors, dtype, shard_size)
    with quiet():
        for part in (model, model.model):  # AutoModelForCausalLM, AutoModel
            custom_object_save(part, folder, config=config)  # type: ignore[arg-type]
        write_companions(folder, config, source)
    write_sources(sources, folder)
