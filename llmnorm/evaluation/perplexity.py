"""The mean loss per token of a causal language model over documents, counted exactly.

Published code of this field averages batch means, counts padding or divides by n + 1 batches;
here nats and targets are summed over all documents and divided once. Training uses
`score_documents` for validation, `llmnorm eval perplexity` on any Hugging Face causal model.
Read `documents.py` next: where the documents come from.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import nn
from torch.nn import functional as F  # noqa: N812 (the name torch's own documentation uses)
from transformers import PreTrainedConfig

from llmnorm.errors import ConfigError, DataError, EnvironmentProblem

IGNORED = -100
"""Target of a position that is not scored: padding, or context of an overlapping window."""

_BATCHES_SORTED_TOGETHER = 64
_LOGITS_UPCAST_TOGETHER = 2**24


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What `score_documents` measured; bits per byte is nan when the bytes are unknown (0)."""

    loss: float
    """Nats per target, over all documents."""
    perplexity: float
    bits_per_byte: float
    tokens: int
    """Targets: every token of every document, the end-of-text before it not counted."""
    bytes: int
    """UTF-8 bytes of the documents."""
    documents: int
    seq_len: int
    stride: int
    dtype: str
    """Of the parameters, or of autocast where it is on."""


@dataclass(frozen=True)
class Window:
    """A stretch of a document: `inputs` and `targets` are (length,), unscored targets IGNORED."""

    inputs: np.ndarray
    targets: np.ndarray

    def unscored(self) -> "Window":
        return Window(self.inputs, np.full_like(self.targets, IGNORED))


@dataclass
class _Seen:
    """Totals of the documents read so far; every rank reads all of them."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    check_ids_below: int = field(kw_only=True)

    def add(self, tokens: np.ndarray, utf8_bytes: int) -> None:
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.check_ids_below:
            raise DataError(
                f"document {self.documents} holds token ids from {tokens.min()} to {tokens.max()},"
                f" expected 0 to {self.check_ids_below - 1} (the model's vocabulary);"
                " tokenize the text with the model's own tokenizer"
            )
        self.documents += 1
        self.tokens += int(tokens.size)
        self.bytes += int(utf8_bytes)


def score_documents(
    model: nn.Module,
    documents: Iterable[tuple[np.ndarray, int]],
    *,
    eos_token_id: int,
    seq_len: int,
    stride: int | None = None,
    batch_size: int = 8,
    rank: int = 0,
    world: int = 1,
    between: Callable[[], object] = lambda: None,
) -> Perplexity:
    """Score every token of every document once.

        loss = (sum of -log p(token | its window so far)) / (number of tokens)

    A document is end-of-text followed by its tokens, cut into windows of `seq_len` inputs. Without
    `stride` they do not overlap: a window's first input is the last target of the window before.
    With a smaller stride each window starts `stride` tokens after the one before and scores only
    what is new, so each target is seen once, with at least `seq_len - stride` tokens of context
    where the document has them. Batches are padded on the right under an attention mask.

    The windows are dealt to the ranks in batches; all ranks run the same number of forwards
    (sharded engines communicate in them) and return the same numbers. The mode of the model
    (train or eval) is restored; autocast is the caller's.

    Args:
        model: a Hugging Face causal language model, or a wrapper that holds it as `module`.
        documents: (token ids without end-of-text, UTF-8 bytes), the same on every rank.
        eos_token_id: the end-of-text token.
        seq_len: inputs per window, at most the model's maximum positions.
        stride: tokens between the starts of two windows, 1 to `seq_len`; default `seq_len`.
        batch_size: windows per forward and rank.
        rank: this process, when the model is evaluated by several.
        world: number of processes that share the windows; above 1 needs a process group.
        between: called before each batch, as often on every rank; what it raises ends the scoring.

    Raises:
        ConfigError: a length, stride or batch size that cannot be, or beyond the positions.
        DataError: no token to score, or an id beyond the vocabulary.
        EnvironmentProblem: `world` above 1 without a process group.
    """
    stride = seq_len if stride is None else stride
    config = _config_of(model)
    _check(seq_len, stride, batch_size, getattr(config, "max_position_embeddings", None))
    if not 0 <= eos_token_id < config.vocab_size:
        raise ConfigError(
            f"end-of-text is token {eos_token_id} and the model has {config.vocab_size} tokens;"
            " name a token that it was trained with"
        )
    if world > 1 and not torch.distributed.is_initialized():
        raise EnvironmentProblem(
            f"scoring over {world} ranks needs a process group and none is initialized;"
            " start the program with accelerate launch"
        )
    seen = _Seen(check_ids_below=config.vocab_size)
    windows = _windows_of(documents, seen, eos_token_id, seq_len, stride)
    nats, targets = 0.0, 0
    with _evaluating(model):
        for batch in _own_batches(_similar(windows, batch_size), rank, world):
            between()
            batch_nats, batch_targets = _score(model, batch, eos_token_id)
            nats, targets = nats + batch_nats, targets + batch_targets
    device = next(model.parameters()).device
    if world > 1:
        nats, targets = _over_ranks(nats, targets, device)
    if targets != seen.tokens:
        raise DataError(
            f"the ranks scored {targets} tokens together and rank {rank} read {seen.tokens}:"
            " every rank must be given the same documents"
        )
    return _result(nats, seen, seq_len, stride, _compute_dtype(model, device))


def cut(stream: np.ndarray, seq_len: int, stride: int) -> Iterator[Window]:
    """Cut end-of-text + tokens into windows in which every token is a target exactly once."""
    end_of_targets = len(stream) - 1
    scored = 0
    for start in range(0, end_of_targets, stride):
        end = min(start + seq_len, end_of_targets)
        targets = stream[start + 1 : end + 1].copy()
        targets[: scored - start] = IGNORED
        yield Window(stream[start:end], targets)
        scored = end
        if end == end_of_targets:
            return


def token_nats(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return -log p of each target, in float32 or the logits' precision, whichever is higher.

    The logits are widened a block of rows at a time: whole they may take gigabytes.

    Shape: logits (rows, vocab), targets (rows,), result (rows,); IGNORED targets give 0.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = max(1, _LOGITS_UPCAST_TOGETHER // logits.shape[-1])
    return torch.cat(
        [
            F.cross_entropy(block.to(dtype), wanted, ignore_index=IGNORED, reduction="none")
            for block, wanted in zip(logits.split(rows), targets.split(rows), strict=True)
        ]
    )


def _config_of(model: nn.Module) -> PreTrainedConfig:
    plain: Any = getattr(model, "module", model)
    return plain.config.get_text_config()


def _check(seq_len: int, stride: int, batch_size: int, positions: int | None) -> None:
    if seq_len < 1 or batch_size < 1:
        raise ConfigError(
            f"seq_len is {seq_len} and batch_size {batch_size}; both must be at least 1"
        )
    if not 1 <= stride <= seq_len:
        raise ConfigError(
            f"stride is {stride}; expected 1 to seq_len ({seq_len}), or tokens would be left out"
        )
    if positions is not None and seq_len > positions:
        raise ConfigError(
            f"seq_len is {seq_len} but the model has {positions} positions"
            f" (max_position_embeddings); use a seq_len of at most {positions}"
        )


def _windows_of(
    documents: Iterable[tuple[np.ndarray, int]],
    seen: _Seen,
    eos_token_id: int,
    seq_len: int,
    stride: int,
) -> Iterator[Window]:
    for tokens, utf8_bytes in documents:
        tokens = np.asarray(tokens, dtype=np.int64)
        seen.add(tokens, utf8_bytes)
        yield from cut(np.concatenate(([eos_token_id], tokens)), seq_len, stride)


def _similar(windows: Iterator[Window], batch_size: int) -> Iterator[list[Window]]:
    """Batch windows of similar length, so that little is padded; a bounded number is held."""
    while group := list(islice(windows, batch_size * _BATCHES_SORTED_TOGETHER)):
        group.sort(key=lambda window: len(window.inputs), reverse=True)
        for first in range(0, len(group), batch_size):
            yield group[first : first + batch_size]


def _own_batches(batches: Iterator[list[Window]], rank: int, world: int) -> Iterator[list[Window]]:
    """Deal batches to ranks in turn; a rank without one in the last round gets unscored ones."""
    while dealt := list(islice(batches, world)):
        yield dealt[rank] if rank < len(dealt) else [dealt[0][0].unscored()]


def _score(model: nn.Module, batch: list[Window], pad_id: int) -> tuple[float, int]:
    """Nats (summed in float64) and number of targets of one batch."""
    shape = (len(batch), max(len(window.inputs) for window in batch))
    inputs, targets = np.full(shape, pad_id), np.full(shape, IGNORED)
    mask = np.zeros(shape, dtype=np.int64)
    for row, window in enumerate(batch):
        length = len(window.inputs)
        inputs[row, :length], targets[row, :length] = window.inputs, window.targets
        mask[row, :length] = 1
    device = next(model.parameters()).device
    logits = model(
        input_ids=torch.from_numpy(inputs).to(device),
        attention_mask=torch.from_numpy(mask).to(device),
        use_cache=False,
    ).logits  # (batch, length, vocab)
    nats = token_nats(logits.flatten(0, 1), torch.from_numpy(targets).flatten().to(device))
    return nats.to("cpu", torch.float64).sum().item(), int((targets != IGNORED).sum())


def _over_ranks(nats: float, targets: int, device: torch.device) -> tuple[float, int]:
    sums = torch.tensor([nats, targets], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(sums)
    return sums[0].item(), int(sums[1].item())


def _result(nats: float, seen: _Seen, seq_len: int, stride: int, dtype: str) -> Perplexity:
    if not seen.tokens:
        raise DataError(
            f"{seen.documents} documents hold no token to score; expected at least one token"
        )
    loss = nats / seen.tokens
    return Perplexity(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else loss * math.inf,
        bits_per_byte=nats / (math.log(2) * seen.bytes) if seen.bytes else math.nan,
        tokens=seen.tokens,
        bytes=seen.bytes,
        documents=seen.documents,
        seq_len=seq_len,
        stride=stride,
        dtype=dtype,
    )


def _compute_dtype(model: nn.Module, device: torch.device) -> str:
    if torch.is_autocast_enabled(device.type):
        name, suffix = torch.get_autocast_dtype(device.type), " autocast"
    else:
        name, suffix = next(p.dtype for p in model.parameters() if p.is_floating_point()), ""
    return str(name).removeprefix("torch.") + suffix


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients inside; the mode the model was in is restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
