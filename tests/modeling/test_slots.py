"""Every slot of a model acts where the written formula puts it, and shared slots share one module.

The wirings here are hand-made: what no placement of ours fills is tested too.
"""

import copy
from typing import Any

import pytest
import torch
from schemes import SHAPE, TOLERANCE, tokens
from torch import nn
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM
from wiring import rope

from llmnorm import LlmNormConfig, LlmNormForCausalLM, build_model
from llmnorm.modeling.residual import Shared
from llmnorm.modeling.streams import TwoStreams

pytestmark = pytest.mark.fast

GAIN, NORM = {"op": "gain"}, {"op": "rmsnorm"}
SHARED = {**GAIN, "shared": True}
PRE = {"attn": {"pre": NORM}, "mlp": {"pre": NORM}}
HEADS, GROUPS, HEAD_DIM = 4, 2, 8
IDS = tokens(2, 7)


def made(attn: dict[str, Any], mlp: dict[str, Any], /, **fields: Any) -> LlmNormForCausalLM:
    """A float64 model of two such blocks, every parameter moved off its start."""
    config = LlmNormConfig(
        **{**SHAPE, "num_hidden_layers": 2},
        placement=None,
        norm=None,
        residuals=[{"attn": attn, "mlp": mlp}] * 2,
        **{"final_norm": NORM, **fields},
    )
    model = build_model(config, seed=1).double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.3 * noise
    return model


def states(model: LlmNormForCausalLM) -> tuple[torch.Tensor, ...]:
    return model.model(IDS, output_hidden_states=True).hidden_states


def gain(module: Any) -> Any:
    return lambda x: (
        module.weight * x if isinstance(getattr(module, "weight", None), nn.Parameter) else x
    )


def rms(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module.weight * x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def by_hand(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """One Pre-LN block with a gain, or nothing, in each of the inner slots."""
    attn, mlp = layer.self_attn, layer.mlp
    h = rms(layer.attn_residual.pre, x)
    batch, seq, _ = x.shape
    q = rope(gain(attn.q_norm)(linear(h, attn.q_proj.weight)).view(batch, seq, HEADS, HEAD_DIM))
    k = rope(gain(attn.k_norm)(linear(h, attn.k_proj.weight)).view(batch, seq, GROUPS, HEAD_DIM))
    q, k = gain(attn.q_rotated)(q), gain(attn.k_rotated)(k).repeat_interleave(2, dim=2)
    v = gain(attn.v_norm)(linear(h, attn.v_proj.weight)).view(batch, seq, GROUPS, HEAD_DIM)
    v = v.repeat_interleave(2, dim=2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / HEAD_DIM**0.5
    scores = scores.masked_fill(torch.ones(seq, seq).triu(1).bool(), float("-inf"))
    context = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
    h = x + linear(gain(attn.inner)(context), attn.o_proj.weight)
    z = rms(layer.mlp_residual.pre, h)
    inner = silu(gain(mlp.gate)(linear(z, mlp.gate_proj.weight)))
    inner = inner * gain(mlp.up)(linear(z, mlp.up_proj.weight))
    return h + linear(gain(mlp.inner)(inner), mlp.down_proj.weight)


INNER = [("attn", slot) for slot in ("q", "k", "v", "q_rotated", "k_rotated", "inner")]
INNER += [("mlp", slot) for slot in ("gate", "up", "inner")]


@pytest.mark.parametrize(("kind", "slot"), INNER)
@torch.no_grad()
def test_an_inner_slot_acts_where_the_formula_puts_it(kind: str, slot: str) -> None:
    filled = {**PRE, kind: {**PRE[kind], slot: GAIN}}
    model = made(filled["attn"], filled["mlp"])
    before, after = states(model)[:2]
    torch.testing.assert_close(
        by_hand(model.model.layers[0], before), after, **TOLERANCE[torch.float64]
    )
    module = model.model.layers[0].self_attn if kind == "attn" else model.model.layers[0].mlp
    name = f"{slot}_norm" if slot in ("q", "k", "v") else slot
    getattr(module, name).weight.fill_(0.0)  # the slot is really used
    assert not torch.allclose(states(model)[1], after)


def test_all_inner_slots_together_follow_the_formula() -> None:
    slots = {kind: {"pre": NORM} | {s: GAIN for k, s in INNER if k == kind} for kind in PRE}
    model = made(slots["attn"], slots["mlp"])
    before, after = states(model)[:2]
    torch.testing.assert_close(
        by_hand(model.model.layers[0], before), after, **TOLERANCE[torch.float64]
    )


def test_a_rotated_slot_sees_each_head_after_rope() -> None:
    model = made({"pre": NORM, "q_rotated": NORM}, {"pre": NORM})
    seen: list[tuple[int, ...]] = []
    model.model.layers[0].self_attn.q_rotated.register_forward_hook(
        lambda module, inputs, output: seen.append(tuple(output.shape))
    )
    model(IDS)
    assert seen == [(2, HEADS, 7, HEAD_DIM)]


def test_the_up_slot_of_a_plain_mlp_stands_before_the_activation() -> None:
    model = made({"pre": NORM}, {"up": GAIN}, mlp="plain", hidden_act="silu")
    mlp, x = model.model.layers[1].mlp, torch.randn(2, 3, 32, dtype=torch.float64)
    wanted = linear(silu(mlp.up.weight * linear(x, mlp.up_proj.weight)), mlp.down_proj.weight)
    torch.testing.assert_close(mlp(x), wanted, **TOLERANCE[torch.float64])


# --- what is read, what is skipped ------------------------------------------------------------


@pytest.mark.parametrize("skips", ["stream", "block"])
@pytest.mark.parametrize("reads", ["stream", "block"])
@torch.no_grad()
def test_the_mlp_reads_and_skips_the_stream_or_the_blocks_input(reads: str, skips: str) -> None:
    model = made({"pre": NORM}, {"pre": NORM, "reads": reads, "skips": skips})
    x, after = states(model)[:2]
    layer = model.model.layers[0]
    seen: dict[str, torch.Tensor] = {}
    layer.attn_residual.register_forward_hook(lambda m, i, output: seen.update(h=output))
    states(model)
    h = seen["h"]
    read, skipped = ({"stream": h, "block": x}[word] for word in (reads, skips))
    wanted = skipped + layer.mlp(rms(layer.mlp_residual.pre, read))
    torch.testing.assert_close(after, wanted, **TOLERANCE[torch.float64])


# --- shared slots -----------------------------------------------------------------------------


def sharing() -> LlmNormForCausalLM:
    return made({"pre": NORM, "post": GAIN}, {"pre": NORM, "post": SHARED})


def parted(model: LlmNormForCausalLM) -> LlmNormForCausalLM:
    """The same function with a gain of its own in each sublayer."""
    other = made({"pre": NORM, "post": GAIN}, {"pre": NORM, "post": GAIN})
    state = model.state_dict()
    for i in range(2):
        name = f"model.layers.{i}.{{}}_residual.post.weight"
        state[name.format("mlp")] = state[name.format("attn")]
    other.load_state_dict(state)
    return other


def test_a_shared_slot_has_one_set_of_parameters() -> None:
    model = sharing()
    names = [name for name, _ in model.named_parameters() if ".post." in name]
    assert names == [f"model.layers.{i}.attn_residual.post.weight" for i in range(2)]
    assert not [name for name in model.state_dict() if "mlp_residual.post" in name]
    assert torch.equal(model(IDS).logits, parted(model)(IDS).logits)


def test_the_gradients_of_a_shared_slot_are_summed() -> None:
    model = sharing()
    other = parted(model)
    for one in (model, other):
        one(IDS, labels=IDS).loss.backward()
    for ours, theirs in zip(model.model.layers, other.model.layers, strict=True):
        wanted = theirs.attn_residual.post.weight.grad + theirs.mlp_residual.post.weight.grad
        found = ours.attn_residual.post.weight.grad
        torch.testing.assert_close(found, wanted, **TOLERANCE[torch.float64])


def test_a_copy_shares_its_own_slot_and_not_the_originals() -> None:
    model = sharing()
    twin = copy.deepcopy(model)
    for one, two in zip(model.model.layers, twin.model.layers, strict=True):
        assert isinstance(two.mlp_residual.post, Shared)
        assert two.mlp_residual.post.module is two.attn_residual.post
        assert two.attn_residual.post is not one.attn_residual.post
    with torch.no_grad():
        twin.model.layers[0].attn_residual.post.weight.mul_(2)
    assert not torch.equal(twin(IDS).logits, model(IDS).logits)
    assert torch.equal(parted(twin)(IDS).logits, twin(IDS).logits)


def test_a_shared_slot_survives_saving_loading_and_a_cast(tmp_path: Any) -> None:
    model = sharing().float()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    layer = loaded.bfloat16().model.layers[1]
    assert layer.mlp_residual.post.module.weight.dtype == torch.bfloat16


# --- two streams, logits ----------------------------------------------------------------------


@torch.no_grad()
def test_two_streams_open_as_copies_and_close_as_a_sum() -> None:
    streams = {"first": NORM, "second": NORM, "scale": 0.5}
    dual = {"pre": NORM, "module": "residual_dual"}
    model = made(dual, dual, streams=streams, final_norm=None)
    assert isinstance(model.model.streams, TwoStreams)
    x = model.model.embed_tokens(IDS)
    p, r = x, 0.5 * x
    inputs: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    out = model.model(IDS, output_hidden_states=True)
    torch.testing.assert_close(inputs[0], torch.stack((p, r)), **TOLERANCE[torch.float64])

    def closed(state: torch.Tensor) -> torch.Tensor:
        return rms(model.model.streams.first, state[0]) + rms(model.model.streams.second, state[1])

    for i, state in enumerate(inputs):
        torch.testing.assert_close(out.hidden_states[i], closed(state), **TOLERANCE[torch.float64])
    assert all(state.shape == (2, 7, 32) for state in out.hidden_states)


@torch.no_grad()
def test_the_logits_are_multiplied_by_what_their_slot_holds() -> None:
    plain = made(*PRE.values())
    scaled = made(*PRE.values(), logits={"op": "constant", "value": 0.25})
    torch.testing.assert_close(scaled(IDS).logits, 0.25 * plain(IDS).logits)
    learned = made(*PRE.values(), logits=GAIN)
    assert learned.logits.weight.shape == (SHAPE["vocab_size"],)
    hidden = learned.model(IDS).last_hidden_state
    wanted = learned.logits.weight * linear(hidden, learned.lm_head.weight)
    torch.testing.assert_close(learned(IDS).logits, wanted)
    torch.testing.assert_close(learned.compute_logits(hidden), wanted)
