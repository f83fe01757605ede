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
    embed: Callable[[Tensor, Reference, Tensor], Tensor] | None = None
    """From our embedding table, the reference's tensors and token ids to embeddings, where
    positions are learned."""
    head_bias: str | None = None
    """The reference's name of a bias on the logits, which our head does not have."""
    blocks_per_layer: int = 1
    """Blocks that the manifest's `hidden.I` counts as one layer."""
    time_first: bool = False
    """Hidden states (time, batch, width) in and out: no embedding, an identity as head."""

    def model(self, dtype: torch.dtype) -> LlmNormForCausalLM:
        return build_model(self.config).to(dtype).eval()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one forward gave; `hidden[i]` is the stream after i layers, before the final norm."""

    output: Tensor
    loss: Tensor
    hidden: dict[int, Tensor]


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
        arguments = _arguments(stack, state, reference, inputs)
        logits = functional_call(model, dict(state), (), arguments, strict=True).logits
    finally:
        for hook in hooks:
            hook.remove()
    if stack.time_first:
        hidden = {i: value.transpose(0, 1) for i, value in hidden.items()}
        output = logits.transpose(0, 1)
        return Outcome(output=output, loss=(output * inputs["dy"]).sum(), hidden=hidden)
    if stack.head_bias is not None:
        logits = logits + reference[stack.head_bias]
    loss = causal_lm_loss(logits, inputs["input_ids"])
    return Outcome(output=logits, loss=loss, hidden=hidden)


def _arguments(
    stack: Stack, state: Mapping[str, Tensor], reference: Reference, inputs: Mapping[str, Tensor]
) -> dict[str, Any]:
    if stack.time_first:
        return {"inputs_embeds": inputs["x"].transpose(0, 1), "use_cache": False}
    if stack.embed is not None:
        table = state["model.embed_tokens.weight"]
        x = stack.embed(table, reference, inputs["input_ids"])
        return {"inputs_embeds": x, "use_cache": False}
    return {"input_ids": inputs["input_ids"], "use_cache": False}


def _watch_input(layer: nn.Module, hidden: dict[int, Tensor]) -> Any:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        hidden[0] = arguments[0]

    return layer.register_forward_pre_hook(hook)


def _watch_output(layer: nn.Module, hidden: dict[int, Tensor], number: int) -> Any:
    def hook(module: nn.Module, arguments: Any, output: Tensor) -> None:
        hidden[number] = output

    return layer.register_forward_hook(hook)
