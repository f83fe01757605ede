"""What is minimized: the summed next-token cross-entropy of a causal language model.

The module owns the language model and is what goes through the engine, so a wrapper (DDP today)
sees one forward that uses every parameter, and the head's weight is only read inside the head's
own forward. The mean over the *global* batch is taken by the loop: sums are exact under any split
into ranks and micro-batches, means of means are not.
"""

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM

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

    Shape: `input_ids`, `targets` and `position_ids` are (batch, seq).

    Args:
        model: the language model.
        logits_per_chunk: largest number of logits held at once.
    """

    def __init__(self, model: LlmNormForCausalLM, logits_per_chunk: int = LOGITS_PER_CHUNK) -> None:
        super().__init__()
        self.model = model
        self.chunk = max(1, logits_per_chunk // model.config.vocab_size)  # tokens

    def forward(
        self, input_ids: Tensor, targets: Tensor, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (loss_sum, count): float64 and int64 scalars."""
        trunk = self.model.base_model
        hidden = trunk(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        hidden = hidden.last_hidden_state.flatten(0, 1)  # (tokens, hidden)
        flat = targets.flatten()  # (tokens,)
        count = (flat != IGNORED).sum()
        if flat.numel() <= self.chunk:
            return self.chunk_loss(hidden, flat), count
        loss_sum = hidden.new_zeros((), dtype=torch.float64)
        for part, wanted in zip(hidden.split(self.chunk), flat.split(self.chunk), strict=True):
            loss_sum = loss_sum + checkpoint(self.chunk_loss, part, wanted, use_reentrant=False)
        return loss_sum, count

    def chunk_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the summed loss of (tokens, hidden) against (tokens,), a float64 scalar."""
        logits = self.model.compute_logits(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        return losses.sum(dtype=torch.float64)
