"""What is minimized: the summed next-token cross-entropy of a causal language model.

The module owns the language model and is what goes through the engine, so a wrapper (DDP today)
sees one forward that uses every parameter, and the head's weight is only read inside the head's
own forward. The mean over the *global* batch is taken by the loop: sums are exact under any split
into ranks and micro-batches, means of means are not.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM
from llmnorm.training.ranks import Ranks

IGNORED = -100
"""A target with this value does not count (padding rows of the last micro-batch)."""

LOGITS_PER_CHUNK = 2**25
"""Logits held at once: 128 MiB in float32. Larger batches are cut into chunks of tokens."""


class Objective(nn.Module):
    """Sum of the cross-entropy over target tokens, and their number.

        loss_sum = sum over tokens t with target y_t >= 0 of  -log softmax(logits_t)[y_t]

    The softmax is computed in float32 or the logits' precision, whichever is higher, and summed
    in float64. When tokens x vocabulary exceed `logits_per_chunk`, the head runs on chunks of
    tokens whose logits are recomputed in backward, so they are never all in memory.

    A module of the model with a `penalty` leaves its `penalty_sum` over the tokens of a forward,
    which is added (FixedStd).

    Shape: `input_ids`, `targets` and `position_ids` are (batch, seq).

    Args:
        model: the language model.
        logits_per_chunk: largest number of logits held at once.
    """

    def __init__(self, model: LlmNormForCausalLM, logits_per_chunk: int = LOGITS_PER_CHUNK) -> None:
        super().__init__()
        self.model = model
        self.chunk = max(1, logits_per_chunk // model.config.vocab_size)  # tokens
        self.penalized: list[Any] = [m for m in model.modules() if getattr(m, "penalty", 0)]
        self._parts: list[dict[str, Tensor]] = []  # one mapping a forward

    def forward(
        self, input_ids: Tensor, targets: Tensor, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (loss_sum, count): float64 and int64 scalars."""
        hidden = hidden_states(self.model, input_ids, position_ids)
        flat = targets.flatten()  # (tokens,)
        return self.complete(self.over_chunks(flat, hidden), {}), (flat != IGNORED).sum()

    def complete(self, loss_sum: Tensor, parts: dict[str, Tensor]) -> Tensor:
        """Add what modules of the model ask for in training; remember what the sum is made of."""
        penalties = [m.penalty_sum for m in self.penalized if m.penalty_sum is not None]
        for module in self.penalized:
            module.penalty_sum = None
        if penalties:
            parts = {**parts, "train/penalty": torch.stack(penalties).sum(dtype=torch.float64)}
            loss_sum = loss_sum + parts["train/penalty"]
        if parts:
            self._parts.append({name: part.detach() for name, part in parts.items()})
        return loss_sum

    def over_chunks(self, targets: Tensor, *hidden: Tensor) -> Tensor:
        """Return the sum of `chunk_loss` over chunks of (tokens,) and of each (tokens, hidden)."""
        if targets.numel() <= self.chunk:
            return self.chunk_loss(*hidden, targets)
        total = hidden[0].new_zeros((), dtype=torch.float64)
        parts = zip(*(tokens.split(self.chunk) for tokens in (*hidden, targets)), strict=True)
        for part in parts:
            total = total + checkpoint(self.chunk_loss, *part, use_reentrant=False)
        return total

    def chunk_loss(self, *tokens: Tensor) -> Tensor:
        """Return the summed loss of (tokens, hidden) against (tokens,), a float64 scalar."""
        hidden, targets = tokens
        return cross_entropy_sum(precise_logits(self.model, hidden), targets)

    def trunks(self) -> list[nn.Module]:
        """The models without head that a forward runs."""
        return [self.model.base_model]

    def take_parts(self, forwards: int) -> dict[str, float]:
        """Return what the loss of this rank's last so many forwards is made of, as sums by name.

        Earlier ones are forgotten: an engine may pass a batch through to settle itself.
        """
        last = self._parts[-forwards:]
        self._parts = []
        return {name: sum(part[name].item() for part in last) for name in (last or [{}])[0]}

    def means(self, forwards: int, count: float, ranks: Ranks) -> dict[str, float]:
        """Return what a step's loss is made of, as means over the global batch (a collective).

        Args:
            forwards: micro-batches of the step on this rank.
            count: target tokens of the global batch.
            ranks: the processes of the run.
        """
        parts = self.take_parts(forwards)
        sums = ranks.sums(*parts.values()) if parts else []
        return {name: total / max(count, 1.0) for name, total in zip(parts, sums, strict=True)}


def hidden_states(
    model: LlmNormForCausalLM, input_ids: Tensor, position_ids: Tensor | None
) -> Tensor:
    """Return what the head reads, (tokens, hidden)."""
    output = model.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
    return output.last_hidden_state.flatten(0, 1)


def precise_logits(model: LlmNormForCausalLM, hidden: Tensor) -> Tensor:
    """Return the logits of (tokens, hidden) in float32 or higher."""
    logits = model.compute_logits(hidden)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy summed over (tokens,) targets, a float64 scalar."""
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    return losses.sum(dtype=torch.float64)
