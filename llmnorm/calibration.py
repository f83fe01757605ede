"""Starts that a scheme measures on its own initial model: Admin's skips.

They belong to the scheme and not to a draw of weights: measured with the weights of seed 0 and
rounded, so that a config resolves to the same numbers in every run. `build_model` calls this.
"""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from llmnorm.modeling.configuration_llmnorm import LlmNormConfig
from llmnorm.modeling.modeling_llmnorm import LlmNormModel
from llmnorm.modeling.residual import NormSpec, ResidualSpec

_PROFILED = "profiled_gain"
_SEQUENCES, _SEQ = 8, 128  # of the random tokens that are measured on
_DIGITS = 4  # of a start


def calibrated(config: LlmNormConfig) -> LlmNormConfig:
    """The config with the start of every profiled gain; itself if nothing waits to be measured.

    In sublayer i it is sqrt(1 + sum over j < i of Var F_j), F_j the branch outputs (over tokens and
    features) of the model whose profiled gains are 1, on random tokens.
    """
    held = [
        norm for pair in config.residual_specs() for spec in pair for norm in spec.slots().values()
    ]
    if not any(map(_waits, held)):
        return config
    sublayers = 2 * config.num_hidden_layers
    total, starts = 1.0, []
    for variance in branch_variances(_started(config, [1.0] * sublayers)):
        starts.append(float(f"{math.sqrt(total):.{_DIGITS}g}"))
        total += variance
    return _started(config, starts)


def assumed(config: LlmNormConfig) -> LlmNormConfig:
    """The config with starts of 1 where they would be measured: the same sizes, nothing built."""
    return _started(config, [1.0] * (2 * config.num_hidden_layers))


@torch.no_grad()
def branch_variances(config: LlmNormConfig) -> list[float]:
    """Var F of each sublayer, in order, of the initial model of seed 0 on random tokens.

    The trunk alone is built and run: no head, no logits.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        trunk: Any = LlmNormModel(config)
    variances: list[float] = []

    def measure(module: nn.Module, inputs: tuple[Tensor, ...], branch: Tensor) -> None:
        variances.append(branch.double().var(correction=0).item())

    for layer in trunk.layers:
        layer.attn_residual.post.register_forward_hook(measure)
        layer.mlp_residual.post.register_forward_hook(measure)
    generator = torch.Generator().manual_seed(0)
    shape = (_SEQUENCES, min(_SEQ, config.max_position_embeddings))
    trunk.eval()(torch.randint(config.vocab_size, shape, generator=generator), use_cache=False)
    return variances


def unmeasured(spec: ResidualSpec) -> ResidualSpec:
    """The same wiring without the starts that were measured for it."""
    held = {slot: norm for slot, norm in spec.slots().items() if norm.op == _PROFILED}
    return spec.having(**{slot: norm.having(value=0.0) for slot, norm in held.items()})


def _waits(spec: NormSpec) -> bool:
    return spec.op == _PROFILED and not spec.options.get("value")


def _started(config: LlmNormConfig, starts: list[float]) -> LlmNormConfig:
    """A copy whose waiting gains start at these values, one a sublayer."""
    config, values = copy.deepcopy(config), iter(starts)
    layers = []
    for pair in config.residual_specs():
        layer = {}
        for kind, spec in zip(("attn", "mlp"), pair, strict=True):
            start, slots = next(values), spec.slots()
            waiting = {
                slot: held.having(value=start) for slot, held in slots.items() if _waits(held)
            }
            layer[kind] = spec.having(**waiting).to_dict()
        layers.append(layer)
    config.residuals = layers
    config.wiring = config.seal()
    return config
