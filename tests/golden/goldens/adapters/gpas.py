"""The LLaMA code of GPAS: the wirings of Mix-LN's repository, each with a gate on its stream."""

import math
from typing import Any

from torch import Tensor

from llmnorm import LlmNormConfig, build_config

from ..cases import Case, NotImplementedCaseError, Switches
from ..stack import Reference, Stack, rewire
from .hf import PERI, PRE, llama_names
from .mixln import OUT, mix_ln, take_llama

_GATED = "_gpas"


def adapt(case: Case) -> Stack:
    switches = Switches(case.fields["config"])
    kind, post_num = switches.take("norm_type"), switches.take("post_num", 0)
    alpha = switches.take("alpha", None)
    shape, norm = take_llama(switches)
    switches.done()
    depth = shape["num_hidden_layers"]
    if alpha is not None and not math.isclose(alpha, (2 * depth) ** 0.25):
        raise NotImplementedCaseError(f"alpha={alpha} at {depth} layers")
    gated, base = kind.endswith(_GATED), kind.removesuffix(_GATED)
    if base == "lns" and not gated:
        raise NotImplementedCaseError("norm_type='lns', for which this code has no branch")
    post = {"post": depth, "deeppost": depth, "post_pre": post_num}.get(base, 0)
    names = [OUT if i < post else PERI if base == "sandwich" else PRE for i in range(depth)]
    overrides = {"embedding": "raw", **case.overrides}
    config = _wiring(base, gated, post, shape, norm, overrides)

    def to_ours(reference: Reference) -> dict[str, Tensor]:
        state = llama_names(reference, config, lambda i: names[i])
        for i in range(depth if gated else 0):
            slot = "skip" if i < post else "out"
            gate = reference[f"model.layers.{i}.gpas_block.gate"]
            state[f"model.layers.{i}.attn_residual.{slot}.gate"] = gate.reshape(1)
        return state

    return Stack(config=config, to_ours=to_ours)


def _wiring(
    base: str,
    gated: bool,
    post: int,
    shape: dict[str, Any],
    norm: dict[str, Any],
    overrides: dict[str, Any],
) -> LlmNormConfig:
    """One of our placements, but for the norm that follows deeppost and the gains of lns."""
    depth = shape["num_hidden_layers"]
    placements: dict[str, Any] = {
        "pre": "pre_ln",
        "lns": "pre_ln",
        "sandwich": "sandwich_ln",
        "deeppost": "deepnorm",
        "post": mix_ln(depth, depth),
        "post_pre": mix_ln(post, depth),
    }
    if base not in placements:
        raise NotImplementedCaseError(f"norm_type={base!r}")
    placement = {"name": "gpas", "base": placements[base]} if gated else placements[base]
    config = build_config(shape, norm=norm, placement=placement, **overrides)
    if base == "deeppost":
        return rewire(config, final_norm=norm)
    return rewire(config, _initial_gain) if base == "lns" else config


def _initial_gain(layer_idx: int, kind: str, slots: dict[str, Any]) -> dict[str, Any]:
    """LNS as this code has it: the factor is where the gains start."""
    return {**slots, "pre": {**slots["pre"], "weight_init": (layer_idx + 1) ** -0.5}}
