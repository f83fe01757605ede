"""The mlp sublayer: gated (SwiGLU, GeGLU) or plain, with a slot after each inner projection and
one before the output projection.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_llmnorm import LlmNormConfig
from .residual import ResidualSpec, build_slot
from .weights import linear


class GatedMLP(nn.Module):
    """y = down( inner( act(gate(W_gate x)) * up(W_up x) ) ), gate and up being slots.

    Shape: x and y are (batch, seq, hidden); inside it is (batch, seq, intermediate).

    Source: Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202.
    """

    def __init__(self, config: LlmNormConfig, spec: ResidualSpec) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.gate_proj = linear(config, hidden, intermediate, bias=config.mlp_bias)
        self.up_proj = linear(config, hidden, intermediate, bias=config.mlp_bias)
        self.down_proj = linear(config, intermediate, hidden, bias=config.mlp_bias)
        self.act = ACT2FN[config.hidden_act]
        self.gate = build_slot(spec.gate, intermediate)
        self.up = build_slot(spec.up, intermediate)
        self.inner = build_slot(spec.inner, intermediate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = self.act(self.gate(self.gate_proj(x)))
        return self.down_proj(self.inner(gate * self.up(self.up_proj(x))))


class PlainMLP(nn.Module):
    """y = down( inner( act(up(W_up x)) ) ), the mlp of GPT-2; up is a slot.

    Shape: x and y are (batch, seq, hidden); inside it is (batch, seq, intermediate).
    """

    def __init__(self, config: LlmNormConfig, spec: ResidualSpec) -> None:
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.up_proj = linear(config, hidden, intermediate, bias=config.mlp_bias)
        self.down_proj = linear(config, intermediate, hidden, bias=config.mlp_bias)
        self.act = ACT2FN[config.hidden_act]
        self.up = build_slot(spec.up, intermediate)
        self.inner = build_slot(spec.inner, intermediate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.inner(self.act(self.up(self.up_proj(x)))))


MLPS: dict[str, type[nn.Module]] = {"gated": GatedMLP, "plain": PlainMLP}
