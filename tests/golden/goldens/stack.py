"""How a stack case is run: our model, with the reference's weights mapped onto it, differentiably.

`functional_call` replaces every parameter of our model by what the adapter's map makes of the
reference's tensors, so outputs, losses and gradients appear under the reference's names.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmnorm import LlmNormConfig, LlmNormForCausalLM, build_model
from llmnorm.modeling.modeling_llmnorm import causal_lm_loss

from .cases import Case, Map, matching

Reference = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What an adapter makes of a case."""

    config: LlmNormConfig
    to_ours: Map
    """From the reference's tensors to the state dict of our causal model, without gaps."""
    head_bias: str | None = None
    """The reference's name of a bias on the logits, which our head does not have."""
    blocks_per_layer: int = 1
    """Blocks that the manifest's `hidden.I` counts as one layer."""
    time_first: bool = False
    """Hidden states (time, batch, width) in and out: no embedding, an identity as head."""
    blocks_only: bool = False
    """Hidden states in, the state after the last block out; attention sees all positions."""
    position: Callable[..., Any] | None = None
    """What the reference does to queries and keys in place of RoPE, where that is no rotation."""

    @property
    def output(self) -> str:
        """What the manifest calls the recorded output."""
        return "y" if self.time_first or self.blocks_only else "logits"

    def model(self, dtype: torch.dtype) -> LlmNormForCausalLM:
        model = build_model(self.config).to(dtype).eval()
        if self.position is not None:
            for layer in model.model.layers:
                layer.self_attn.position = self.position
        return model


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one forward gave; `hidden[i]` is the stream after i layers, before the final norm.

    Of two streams it is the first, `hidden_y[i]` the second.
    """

    output: Tensor
    loss: Tensor
    hidden: dict[int, Tensor]
    hidden_y: dict[int, Tensor]

    @classmethod
    def of(cls, stack: Stack, output: Tensor, loss: Tensor, states: dict[int, Tensor]) -> "Outcome":
        """The outcome with the states of one or two streams, as the layers gave them."""
        if stack.time_first:
            states = {i: state.transpose(-3, -2) for i, state in states.items()}
        pairs = {i: (h[0], h[1]) if h.ndim == 4 else (h, h) for i, h in states.items()}
        return cls(
            output=output,
            loss=loss,
            hidden={i: pair[0] for i, pair in pairs.items()},
            hidden_y={i: pair[1] for i, pair in pairs.items()},
        )


def rewire(
    config: LlmNormConfig,
    change: Callable[[int, str, dict[str, Any]], dict[str, Any]] | None = None,
    final_norm: Any = ...,
) -> LlmNormConfig:
    """A hand-made wiring: the residuals of `config` after `change(layer_idx, kind, slots)`.

    For references that deviate from the placement's rule; `final_norm` is kept unless given.
    """
    config = copy.deepcopy(config)
    config.residuals = [
        {kind: change(i, kind, dict(slots)) if change else slots for kind, slots in layer.items()}
        for i, layer in enumerate(config.residuals or [])
    ]
    if final_norm is not ...:
        config.final_norm = final_norm
    config.norm = config.placement = config.wiring = None
    config.qk_norm = "none"
    return config


def reference_of(case: Case, prefix: str = "sd.") -> dict[str, Tensor]:
    """The reference's tensors that the case uses, in its precision, as leaves of the graph."""
    data = case.manifest.tensors()
    names = case.fields.get("params") or [name for _, name in matching(set(data), prefix)]
    return {name: data[prefix + name].to(case.dtype).requires_grad_() for name in names}


def check_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Raise unless the map fills every parameter of our model, each in its shape, and no other."""
    ours = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    mapped = {name: tuple(value.shape) for name, value in state.items()}
    assert mapped == ours, f"names and shapes differ: {sorted(mapped.items() ^ ours.items())}"


def run(
    stack: Stack,
    model: LlmNormForCausalLM,
    reference: Reference,
    inputs: Mapping[str, Tensor],
) -> Outcome:
    """One forward of our model with the reference's weights; `inputs` holds input_ids, or x, dy."""
    return run_state(stack, model, stack.to_ours(reference), reference, inputs)


def run_state(
    stack: Stack,
    model: LlmNormForCausalLM,
    state: Mapping[str, Tensor],
    reference: Reference,
    inputs: Mapping[str, Tensor],
) -> Outcome:
    """One forward of our model with `state`; `reference` gives what our model has no place for."""
    check_state(model, state)
    hidden: dict[int, Tensor] = {}
    hooks = [_watch_input(model.model.layers[0], hidden)]
    hooks += [_watch_output(layer, hidden, i) for i, layer in enumerate(model.model.layers, 1)]
    try:
        if stack.blocks_only:
            output = _through_blocks(model, state, inputs["x"])
        else:
            arguments = _arguments(stack, inputs)
            output = functional_call(model, dict(state), (), arguments, strict=True).logits
    finally:
        for hook in hooks:
            hook.remove()
    if stack.output == "y":
        output = output.transpose(0, 1) if stack.time_first else output
        return Outcome.of(stack, output, (output * inputs["dy"]).sum(), hidden)
    if stack.head_bias is not None:
        output = output + reference[stack.head_bias]
    return Outcome.of(stack, output, causal_lm_loss(output, inputs["input_ids"]), hidden)


def _through_blocks(model: LlmNormForCausalLM, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The state after the last block, without a causal mask and without positions."""
    h, everywhere = model.model.streams.open(x), x.new_zeros(1, 1, 1, 1)
    for i, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{i}."
        own = {name.removeprefix(prefix): v for name, v in state.items() if prefix in name}
        kwargs = {"rotary": None, "attention_mask": everywhere.expand(1, 1, x.shape[1], x.shape[1])}
        h = functional_call(layer, own, (h,), kwargs, strict=True)
    return h


def _arguments(stack: Stack, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    if stack.time_first:
        return {"inputs_embeds": inputs["x"].transpose(0, 1), "use_cache": False}
    return {"input_ids": inputs["input_ids"], "use_cache": False}


def _watch_input(layer: nn.Module, hidden: dict[int, Tensor]) -> Any:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        hidden[0] = arguments[0]

    return layer.register_forward_pre_hook(hook)


def _watch_output(layer: nn.Module, hidden: dict[int, Tensor], number: int) -> Any:
    def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
        hidden[number] = output

    return layer.register_forward_hook(hook)
