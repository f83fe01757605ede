"""Learning from a teacher: the run-file section `distill`.

The teacher is a finished model of ours with the same vocabulary, in evaluation mode, without
gradients, in the run's arithmetic. Every rank holds it whole in float32, whatever the engine.
"""

from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor, nn

from llmnorm.build import build_model
from llmnorm.config.start import read_config
from llmnorm.errors import ConfigError
from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.modeling_llmnorm import LlmNormForCausalLM
from llmnorm.training.objective import (
    IGNORED,
    LOGITS_PER_CHUNK,
    Objective,
    cross_entropy_sum,
    hidden_states,
    precise_logits,
)
from llmnorm.training.weights import load_weights

TEACHER = "distill.teacher"
"""The key of the run file, for messages."""


class Distillation(Objective):
    r"""The cross-entropy of the text, mixed with the divergence from a teacher.

        loss_sum = sum over target tokens of
            (1 - weight) * cross-entropy + weight * T^2 * KL(softmax(u / T) || softmax(z / T))

    z are the model's logits, u the teacher's. Divided by the number of targets of the global batch
    like any loss, so the split into ranks and micro-batches does not matter.

    Args:
        model: the language model that learns.
        teacher: a model of the same vocabulary; it is not a submodule, so no engine shards, steps
            or saves it.
        weight: share of the teacher; with 1 the text's own next tokens count nothing.
        temperature: T; above 1 more is learned from unlikely tokens.
        logits_per_chunk: largest number of logits held at once, the teacher's included.

    Raises:
        ConfigError: if the vocabularies differ.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531.
    """

    def __init__(
        self,
        model: LlmNormForCausalLM,
        teacher: LlmNormForCausalLM,
        *,
        weight: float,
        temperature: float,
        logits_per_chunk: int = LOGITS_PER_CHUNK,
    ) -> None:
        super().__init__(model, max(1, logits_per_chunk // 2))
        check_vocabularies(teacher.config, model.config)
        self._held = (teacher.eval().requires_grad_(False),)  # a tuple hides it from nn.Module
        self.weight, self.temperature = weight, temperature

    @property
    def teacher(self) -> LlmNormForCausalLM:
        """The model that is learned from."""
        return self._held[0]

    def forward(
        self, input_ids: Tensor, targets: Tensor, position_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return (loss_sum, count): float64 and int64 scalars."""
        with torch.no_grad():
            taught = hidden_states(self.teacher, input_ids, position_ids)
        hidden = hidden_states(self.model, input_ids, position_ids)
        flat = targets.flatten()
        parts = self.over_chunks(flat, hidden, taught)
        mixed = (1 - self.weight) * parts[0] + self.weight * self.temperature**2 * parts[1]
        named = {"train/cross_entropy": parts[0], "train/divergence": parts[1]}
        return self.complete(mixed, named), (flat != IGNORED).sum()

    def chunk_loss(self, *tokens: Tensor) -> Tensor:
        """Return (2,) float64: the summed cross-entropy and the summed divergence."""
        hidden, taught, targets = tokens
        logits = precise_logits(self.model, hidden)
        with torch.no_grad():
            wanted = F.log_softmax(precise_logits(self.teacher, taught) / self.temperature, dim=-1)
        found = F.log_softmax(logits / self.temperature, dim=-1)
        divergence = F.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
        divergence = divergence.masked_fill(targets == IGNORED, 0.0).sum(dtype=torch.float64)
        return torch.stack((cross_entropy_sum(logits, targets), divergence))

    def trunks(self) -> list[nn.Module]:
        """As in `Objective`, and the teacher's."""
        return [*super().trunks(), self.teacher.base_model]


def check_vocabularies(teacher: LlmNormConfig, model: LlmNormConfig) -> None:
    """Refuse a teacher of another vocabulary.

    Raises:
        ConfigError: naming both sizes.
    """
    if teacher.vocab_size != model.vocab_size:
        raise ConfigError(
            f"{TEACHER} has a vocabulary of {teacher.vocab_size}, the model of {model.vocab_size}; "
            "expected the same"
        )


def load_teacher(folder: Path, device: torch.device) -> LlmNormForCausalLM:
    """Return the model of a folder, in float32 on a device.

    Raises:
        ConfigError: if the folder holds another kind of model.
        CheckpointError: if its weights cannot be read.
    """
    try:
        config = read_config(folder)
    except ValueError as error:
        raise ConfigError(f"{TEACHER}={folder}: {error}") from error
    model = build_model(config)
    load_weights(model, folder, key=TEACHER)
    model.to(device)  # type: ignore[arg-type]  # a decorator hides nn.Module's types
    return model
