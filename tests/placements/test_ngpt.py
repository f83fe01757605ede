"""nGPT: y = N(x + |a| (N(F(x)) - x)), everything of length one (Loshchilov et al. 2024)."""

import math
from typing import Any

import pytest
import torch
from schemes import SHAPE, TOLERANCE, tokens
from torch import nn
from torch.nn.functional import linear, silu
from wiring import assert_follows, model_of, names_in_layers, norm_names, rope

from llmnorm import LlmNormForCausalLM, build_config, build_model
from llmnorm.errors import ConfigError
from llmnorm.modeling.weights import unit_dim
from llmnorm.training.constraints import Constraints

pytestmark = pytest.mark.fast

WIDTH, HEADS, GROUPS, HEAD_DIM = 32, 4, 2, 8
SLOTS = (
    "attn_residual.first",
    "mlp_residual.first",
    "self_attn.q_rotated",
    "mlp.gate",
    "mlp.up",
)


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def ngpt(**overrides: Any) -> LlmNormForCausalLM:
    return model_of("ngpt", norm="l2norm", **overrides)


def papers_attention(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Queries and keys of length one times s, scores times sqrt(head_dim)."""
    batch, seq, _ = x.shape
    part = layer.self_attn
    s = (part.q_rotated.weight * math.sqrt(WIDTH)).view(HEADS, HEAD_DIM)
    query = unit(rope(linear(x, part.q_proj.weight).view(batch, seq, HEADS, HEAD_DIM)))
    key = unit(rope(linear(x, part.k_proj.weight).view(batch, seq, GROUPS, HEAD_DIM)))
    value = linear(x, part.v_proj.weight).view(batch, seq, GROUPS, HEAD_DIM)
    context = torch.empty_like(query)
    for head in range(HEADS):
        group = head * GROUPS // HEADS
        scores = (s[head] * query[:, :, head]) @ (s[head] * key[:, :, group]).mT
        scores = scores * math.sqrt(HEAD_DIM)
        future = torch.ones(seq, seq).triu(1).bool()
        context[:, :, head] = (
            scores.masked_fill(future, -torch.inf).softmax(-1) @ value[:, :, group]
        )
    return linear(context.flatten(2), part.o_proj.weight)


def papers_mlp(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """SwiGLU with the root of the width on the gate alone."""
    part = layer.mlp
    gate = linear(x, part.gate_proj.weight) * part.gate.weight * math.sqrt(WIDTH)
    up = linear(x, part.up_proj.weight) * part.up.weight
    return linear(up * silu(gate), part.down_proj.weight)


def block(number: int, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for residual, branch in (
        (layer.attn_residual, papers_attention),
        (layer.mlp_residual, papers_mlp),
    ):
        rate = (residual.first.weight * 0.05 * math.sqrt(WIDTH)).abs()
        x = unit(x + rate * (unit(branch(layer, x)) - x))
    return x


@pytest.mark.parametrize("depth", [1, 4])
def test_each_sublayer_steps_towards_its_branch_on_the_sphere(depth: int) -> None:
    assert_follows(ngpt(depth=depth), block, final=False)


@torch.no_grad()
def test_the_root_of_the_width_on_up_as_well_changes_nothing() -> None:
    """The code has it on both, the paper on the gate; the branch is normalized."""
    model, ids = ngpt(), tokens()
    before = model(ids).logits
    for layer in model.model.layers:
        layer.mlp.up.weight *= 7.0
    torch.testing.assert_close(model(ids).logits, before, **TOLERANCE[torch.float64])
    for layer in model.model.layers:
        layer.mlp.gate.weight *= 7.0
    assert not torch.allclose(model(ids).logits, before, atol=1e-3)


@torch.no_grad()
def test_logits_are_multiplied_by_a_gain_for_each_entry_of_the_vocabulary() -> None:
    model, ids = ngpt(), tokens()
    hidden = model.model(ids).last_hidden_state
    wanted = linear(hidden, model.lm_head.weight) * model.logits.weight * math.sqrt(WIDTH)
    torch.testing.assert_close(model(ids).logits, wanted, **TOLERANCE[torch.float64])


def test_its_parameters_are_gains_alone_and_no_norm_has_any() -> None:
    model = ngpt()
    names = norm_names(model)
    assert names == names_in_layers(4, *SLOTS, final=False) | {"logits.weight"}
    assert type(model.model.norm) is nn.Identity


def test_gains_start_where_the_paper_says() -> None:
    model = build_model(build_config(SHAPE, norm="l2norm", placement="ngpt"))
    layer, stored = model.model.layers[2], pytest.approx(WIDTH**-0.5)
    assert layer.attn_residual.first.weight.tolist() == [stored] * WIDTH
    assert layer.self_attn.q_rotated.weight.tolist() == [stored] * WIDTH
    assert layer.mlp.gate.weight.tolist() == [1.0] * SHAPE["intermediate_size"]
    assert model.logits.weight.tolist() == [stored] * SHAPE["vocab_size"]
    ones = torch.ones(1)
    torch.testing.assert_close(layer.attn_residual.first(ones), torch.full((WIDTH,), 0.05))
    torch.testing.assert_close(layer.mlp.gate(ones), torch.full((56,), math.sqrt(WIDTH)))
    torch.testing.assert_close(model.logits(ones), torch.ones(97))


def unit_slices(model: nn.Module) -> dict[str, torch.Tensor]:
    """The lengths of every matrix along the hidden axis."""
    return {
        name: module.weight.detach().norm(dim=unit_dim(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }


def test_every_matrix_starts_with_length_one_along_the_hidden_axis() -> None:
    model = build_model(build_config(SHAPE, norm="l2norm", placement="ngpt"))
    lengths = unit_slices(model)
    assert len(lengths) == 4 * 7 + 2
    for name, length in lengths.items():
        torch.testing.assert_close(length, torch.ones_like(length), msg=name)
    down = model.model.layers[0].mlp.down_proj.weight
    assert lengths["model.layers.0.mlp.down_proj"].shape == (56,)
    assert down.shape == (32, 56)


def test_every_matrix_has_length_one_again_after_each_optimizer_step() -> None:
    model = build_model(build_config(SHAPE, norm="l2norm", placement="ngpt"))
    optimizer, rules = torch.optim.AdamW(model.parameters(), lr=0.01), Constraints(model)
    for step in (1, 2, 3):
        optimizer.zero_grad()
        model(tokens(seed=step), labels=tokens(seed=step)).loss.backward()
        with rules.around(step):
            optimizer.step()
            drifted = unit_slices(model)
        assert all(((length - 1).abs() > 1e-4).any() for length in drifted.values())
        for name, length in unit_slices(model).items():
            torch.testing.assert_close(length, torch.ones_like(length), msg=name)


@torch.no_grad()
def test_tokens_have_length_one_after_every_layer() -> None:
    model = build_model(build_config(SHAPE, norm="l2norm", placement="ngpt"))
    for state in model(tokens(), output_hidden_states=True).hidden_states:
        torch.testing.assert_close(state.norm(dim=-1), torch.ones(2, 9))


@torch.no_grad()
def test_a_rate_of_zero_leaves_the_embedding_and_a_rate_of_one_takes_the_branch() -> None:
    model, ids = ngpt(depth=1), tokens()
    model.model.embed_tokens.weight.copy_(unit(model.model.embed_tokens.weight))
    layer = model.model.layers[0]
    for residual in (layer.attn_residual, layer.mlp_residual):
        residual.first.weight.zero_()
    end = model.model(ids).last_hidden_state
    torch.testing.assert_close(end, model.model.embed_tokens(ids), **TOLERANCE[torch.float64])
    layer.mlp_residual.first.weight.fill_(1 / (0.05 * math.sqrt(WIDTH)))
    branch = unit(papers_mlp(layer, model.model.embed_tokens(ids)))
    torch.testing.assert_close(
        model.model(ids).last_hidden_state, branch, **TOLERANCE[torch.float64]
    )


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", "scalenorm"])
def test_its_norm_is_the_l2_norm_and_no_other(norm: str) -> None:
    with pytest.raises(ConfigError, match=f"ngpt is defined for norm l2norm; saw {norm}"):
        build_config(SHAPE, norm=norm, placement="ngpt")


@pytest.mark.parametrize(
    ("option", "value"),
    [("length", "sqrt_dim"), ("gain", "vector"), ("groups", 2), ("scale", 2.0)],
)
def test_an_l2_norm_of_another_length_is_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"sphere: l2norm\.{option} is .*; expected"):
        build_config(SHAPE, norm={"op": "l2norm", option: value}, placement="ngpt")


def test_the_rate_is_an_option_and_the_eps_of_the_norm_reaches_queries_too() -> None:
    norm, placement = {"op": "l2norm", "eps": 1e-6}, {"name": "ngpt", "rate": 0.25}
    attn = build_config(SHAPE, norm=norm, placement=placement).residuals[1]["attn"]
    assert attn["first"]["value"] == 0.25
    assert {slot: attn[slot]["eps"] for slot in ("post", "out", "q_rotated", "k_rotated")} == (
        dict.fromkeys(("post", "out", "q_rotated", "k_rotated"), 1e-6)
    )
    with pytest.raises(ConfigError, match=r"ngpt\.rate is 0\.0; expected a number above 0"):
        build_config(SHAPE, norm="l2norm", placement={"name": "ngpt", "rate": 0.0})


def test_matrices_are_held_at_unit_rows_unless_asked_otherwise() -> None:
    config = build_config(SHAPE, norm="l2norm", placement="ngpt")
    assert (config.weights, config.embedding, config.final_norm) == ("unit", "raw", None)
    loose = build_config(SHAPE, norm="l2norm", placement="ngpt", weights="plain")
    assert loose.weights == "plain"
