"""Models whose every gain and bias is moved, so that none can be lost unseen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from schemes import tokens
from wiring import model_of

from llmnorm import LlmNormForCausalLM
from llmnorm.export import Form


@pytest.fixture
def moved() -> Callable[..., LlmNormForCausalLM]:
    """`moved(placement, norm=..., **overrides)`: a float64 model with weights off their starts."""
    return model_of


@pytest.fixture
def logits() -> Callable[[Any], torch.Tensor]:
    """Logits of a model or a form on a few tokens, (batch, seq, vocab)."""

    def run(model: Any) -> torch.Tensor:
        if isinstance(model, Form):
            model = model.to_model()
        with torch.no_grad():
            return model(tokens()).logits

    return run
