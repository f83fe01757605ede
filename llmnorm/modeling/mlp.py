"""The mlp sublayer: gated (SwiGLU, GeGLU) or plain, with a slot before the output projection."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_llmnorm import LlmNormConfig
from .residual import ResidualSpec, build_slot


class GatedMLP(nn.Module):
    """y = down( inner( act(gate(x)) * up(x) ) ).

    Shape: x and y are (batch, seq, hidden); inside it is (batch, seq, intermediate).

    Source: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202.
    """

    def __init__(self, config: LlmNormConfig, spec: ResidualSpec) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, intermediate, bias=config.mlp_bias)
        self.up_proj = nn.Linear(hidden, intermediate, bias=config.mlp_bias)
        self.down_proj = nn.Linear(intermediate, hidden, bias=config.mlp_bias)
        self.act = ACT2FN[config.hidden_act]
        self.inner = build_slot(spec.inner, intermediate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.inner(self.act(self.gate_proj(x)) * self.up_proj(x)))


class PlainMLP(nn.Module):
    """y = down( inner( act(up(x)) ) ), the mlp of GPT-2.

    Shape: x and y are (batch, seq, hidden); inside it is (batch, seq, intermediate).
    """

    def __init__(self, config: LlmNormConfig, spec: ResidualSpec) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.up_proj = nn.Linear(hidden, intermediate, bias=config.mlp_bias)
        self.down_proj = nn.Linear(intermediate, hidden, bias=config.mlp_bias)
        self.act = ACT2FN[config.hidden_act]
        self.inner = build_slot(spec.inner, intermediate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.inner(self.act(self.up_proj(x))))


MLPS: dict[str, type[nn.Module]] = {"gated": GatedMLP, "plain": PlainMLP}
