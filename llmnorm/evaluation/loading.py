"""Find and load what an evaluation is given: a run, a Hugging Face folder, or a hub name.

A run is represented by its `final/` folder. Code that a folder carries is run only when the user
asks for it; llmnorm's own classes are registered by `import llmnorm` and need no such trust.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from llmnorm.config.document import MAX_BYTES, read_document
from llmnorm.errors import CheckpointError, ConfigError, DataError
from llmnorm.evaluation.quiet import quiet
from llmnorm.evaluation.screening import screen_config, screen_weights
from llmnorm.resources import suggest

LONGEST_DEFAULT_WINDOW = 2048

_TOKENIZER_FILES = ("tokenizer*", "*vocab*", "merges.txt", "*.model", "*.tiktoken")

# Constants that older versions of transformers saved with GPT-2, GPT-J, GPT-Neo and Llama: masks
# and rotary frequencies.
_OLD_BUFFERS = (
    *(".attn.bias", ".attn.masked_bias"),
    *(".attention.bias", ".attention.masked_bias"),
    ".inv_freq",
)

_DTYPES: dict[str, str | torch.dtype] = {
    "auto": "auto",
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

DTYPES = tuple(_DTYPES)
"""Names of precisions a model may be loaded in; `auto` is the one it was saved in."""


@dataclass(frozen=True)
class Source:
    """Where a model is: `location` is a folder or hub name, `run` the run it belongs to, if any."""

    location: str
    run: Path | None

    @property
    def name(self) -> str:
        return str(self.run or self.location)


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode on its device, with its tokenizer where the folder has one."""

    source: Source
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    trained_seq_len: int | None
    """Inputs per training sequence; known for runs alone."""

    def seq_len(self, asked: int | None) -> int:
        """The window to evaluate with: as asked, as trained, or the positions up to 2,048."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        fallback = min(positions or LONGEST_DEFAULT_WINDOW, LONGEST_DEFAULT_WINDOW)
        return asked or self.trained_seq_len or fallback

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer, or say that the model came without one."""
        if self.tokenizer is None:
            raise ConfigError(
                f"{self.source.location} holds no tokenizer;"
                " name one with --tokenizer FOLDER_OR_NAME"
            )
        return self.tokenizer


def find(model: str) -> Source:
    """Resolve a run folder, a Hugging Face folder or a hub name.

    Raises:
        CheckpointError: a run that has not finished.
        ConfigError: a folder that is neither a run nor a model, or is not there.
    """
    if not model or set(model) & set("\0\r\n"):
        raise ConfigError(f"{model!r:.80} names no model; expected a folder or a hub name")
    folder = Path(model)
    if (folder / "config.json").is_file():
        in_run = folder.name == "final" and is_run(folder.parent)
        return Source(model, folder.parent if in_run else None)
    if is_run(folder):
        final = folder / "final"
        if not (final / "config.json").is_file():
            raise CheckpointError(
                f"{folder} is an unfinished run: it has no final/ folder;"
                " continue it with the command that started it"
            )
        return Source(str(final), folder)
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        state = "is neither a run nor a model" if folder.exists() else "does not exist"
        raise ConfigError(
            f"{model} {state}; expected a run folder (config.yaml and final/),"
            " a Hugging Face folder (config.json) or a hub name"
        )
    if model.count("/") == 1 and any(is_run(beside) for beside in folder.parent.glob("*")):
        near = suggest(folder.name, [beside.name for beside in folder.parent.glob("*")])
        raise ConfigError(f"{model} does not exist, though {folder.parent} has other runs{near}")
    return Source(model, None)


def is_run(folder: Path) -> bool:
    """Whether the folder has the resolved run file that training writes first."""
    return (folder / "config.yaml").is_file()


def read_run_config(run: Path) -> dict[str, Any]:
    """Return the resolved run file as nested mappings.

    Raises:
        DataError: it cannot be read, or does not say what was trained.
    """
    file = run / "config.yaml"
    try:
        with file.open("rb") as handle:
            content = read_document(handle.read(MAX_BYTES + 1).decode("utf-8"), str(file)).value
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    for path in ("model.norm.op", "model.placement.name", "data.seq_len"):
        value = content
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is None:
            raise DataError(f"{file} has no {path}; expected the run file that training writes")
    return content


def load(
    model: str,
    *,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    tokenizer: str | None = None,
    eos_token: str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load a causal language model for evaluation.

    Args:
        model: a run, a Hugging Face folder, or a hub name.
        dtype: one of `DTYPES`.
        device: where the weights go.
        tokenizer: a folder or hub name, for models that come without one.
        eos_token: which of the tokenizer's tokens is end-of-text, when it does not say.
        trust_remote_code: whether code in the folder may run.

    Raises:
        ConfigError: no such model or tokenizer, or code that is not trusted.
        CheckpointError: an unfinished run, or weights or a tokenizer that cannot be read.
        DataError: a run whose config.yaml cannot be read.
    """
    source = find(model)
    screen_weights(source.location, _check_config(source, trust_remote_code))
    weights = _weights(source, dtype, trust_remote_code)
    weights.to(torch.device(device))  # type: ignore[arg-type]  # a decorator hides nn.Module's types
    seq_len = read_run_config(source.run)["data"]["seq_len"] if source.run else None
    return Loaded(
        source=source,
        model=weights.eval(),
        tokenizer=_tokenizer(source, tokenizer, eos_token, trust_remote_code),
        trained_seq_len=seq_len,
    )


def _check_config(source: Source, trust_remote_code: bool) -> Path:
    """Return the model's folder; fail early when it is unknown or its code is not trusted."""
    try:
        folder = screen_config(source.location)
        AutoConfig.from_pretrained(source.location, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        hint = " (pass --trust-remote-code to run it)" if "trust_remote_code" in str(error) else ""
        raise ConfigError(
            f"{source.location} cannot be opened as a model: {_reason(error)}{hint}"
        ) from error
    return folder


def _weights(source: Source, dtype: str, trust_remote_code: bool) -> PreTrainedModel:
    try:
        with quiet(), _without_report():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.location,
                dtype=_DTYPES[dtype],
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except Exception as error:  # whatever the weights' readers raise, the folder is to blame
        raise CheckpointError(
            f"{source.location}: the weights cannot be loaded: {_reason(error)}"
        ) from error
    model, info = loaded
    _check_tensors(source, model, info)
    return model


@contextmanager
def _without_report() -> Iterator[None]:
    """Leave out transformers' table of tensors that do not fit: `_check_tensors` names them."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _check_tensors(source: Source, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Refuse weights that are not the model's, all of it and no more, or are no numbers."""
    if absent := sorted(info["missing_keys"]):  # transformers would leave them at random values
        raise CheckpointError(
            f"{source.location}: {len(absent)} of the model's tensors are not in its weights"
            f" ({', '.join(absent[:3])}); expected a complete causal language model"
        )
    foreign = sorted(key for key in info["unexpected_keys"] if not key.endswith(_OLD_BUFFERS))
    if foreign:  # transformers would leave them out
        raise CheckpointError(
            f"{source.location}: {len(foreign)} tensors of its weights are not the model's"
            f" ({', '.join(foreign[:3])}); expected weights and config.json of the same model"
        )
    spoilt = [
        name
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and weight.itemsize > 1 and not weight.isfinite().all()
    ]
    if spoilt:
        raise CheckpointError(
            f"{source.location}: {len(spoilt)} of the model's tensors are not finite"
            f" ({', '.join(spoilt[:3])}), so the loss is not finite; use an earlier checkpoint"
        )


def _tokenizer(
    source: Source, other: str | None, eos_token: str | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase | None:
    location = other or source.location
    asked = other is not None or eos_token is not None
    if not asked and Path(location).is_dir() and not _has_tokenizer(location):
        return None  # of some classes transformers would make one without words
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged file makes the readers raise anything
        problem = f"{location} cannot be opened as a tokenizer: {_reason(error)}"
        if asked:
            raise ConfigError(problem) from error
        if _has_tokenizer(location):
            raise CheckpointError(f"{problem}; restore it, or name one with --tokenizer") from error
        return None
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise ConfigError(f"--eos-token {eos_token} is not a token of {location}'s tokenizer")
        tokenizer.eos_token = eos_token
    return tokenizer


def _has_tokenizer(location: str) -> bool:
    """Whether a folder here holds a file of a tokenizer."""
    return any(any(Path(location).glob(name)) for name in _TOKENIZER_FILES)


def _reason(error: Exception) -> str:
    """The error's first line, and what helps where a norm of the user's own is not registered."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if isinstance(error, StrictDataclassError):  # its first line names the field, the next says why
        line = " ".join(str(error).split())
    return f"{line}; import the module that registers it first" if "unknown norm" in line else line
