"""Real text to compare models on, wherever a model is: its own data, a file, or Python's manual."""

from pathlib import Path
from typing import Any

import torch

from llmnorm.errors import DataError

_CHARACTERS_PER_TOKEN = 8  # more than any tokenizer needs on average


def real_text(
    tokenizer: Any | None,
    vocab_size: int,
    seq_len: int,
    batch: int,
    *,
    file: Path | None = None,
) -> tuple[torch.Tensor, str]:
    """Token ids (batch, seq_len) of real text, and where it is from.

    The text is that of `file`, else Python's language reference, which every Python carries. A
    model without a tokenizer gets seeded random ids, and the second value says so. A short text
    gives fewer or shorter rows.

    Args:
        tokenizer: the model's own, or None.
        vocab_size: of the model; ids must be below it.
        seq_len: at most the model's positions.
        batch: rows; row i is the i-th stretch of the text.
        file: UTF-8 text of the user's.

    Raises:
        DataError: if the file cannot be read, or holds fewer than 8 tokens.
    """
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocab_size, (batch, seq_len), generator=generator)
        return ids, "random ids, as the model has no tokenizer"
    text = _manual() if file is None else _read(file)
    text = text[: batch * seq_len * _CHARACTERS_PER_TOKEN]
    found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(found) < 8:
        raise DataError(f"{file}: {len(found)} tokens; a comparison needs at least 8")
    if max(found) >= vocab_size:
        raise DataError(
            f"the tokenizer gives token {max(found)}, but the model has {vocab_size} entries"
        )
    length = min(seq_len, len(found))
    rows = min(batch, len(found) // length)
    source = "Python's language reference" if file is None else file.name
    return torch.tensor(found[: rows * length]).view(rows, length), source


def _manual() -> str:
    import pydoc_data.topics  # half a megabyte that nobody else needs

    topics: dict[str, str] = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as text: {error}") from error
