"""What environment.json says of a start of a run, and the work that training takes."""

import platform
import sys
from datetime import UTC, datetime
from typing import Any

import torch
from transformers import PreTrainedModel

from llmnorm.environment import device_name, elements, git_commit, parameter_counts, versions
from llmnorm.training.ranks import Ranks


def flops_per_token(model: PreTrainedModel, seq_len: int) -> float:
    """Return floating-point operations of training on one token: 6 N + 12 L d T.

    N counts the matrices that a token passes (all parameters but embedding tables), L layers,
    d width, T sequence length; attention is counted without the causal half.
    Source: Chowdhery et al., "PaLM", appendix B, arXiv:2204.02311.
    """
    config = model.config
    head = sum(elements(parameter) for parameter in model.get_output_embeddings().parameters())
    passed = parameter_counts(model)["non_embedding"] + head
    attention = 12 * config.num_hidden_layers * config.hidden_size * seq_len
    return 6.0 * passed + attention


def start_record(ranks: Ranks) -> dict[str, Any]:
    """Return what is true of this start of the run."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.argv],
        "world": ranks.world,
        "device": device_name(ranks.device),
        "device_type": ranks.device.type,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": versions(),
        "git_commit": git_commit(),
    }
