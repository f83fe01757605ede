"""ReZero: x + a F(x) without norms, a shared by attention and mlp of a layer."""

import pytest
import torch
from schemes import SHAPE, TOLERANCE, tokens
from wiring import assert_follows, attention, mlp, model_of, names_in_layers, norm_names, same

from llmnorm import build_config, build_model

pytestmark = pytest.mark.fast


def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    a = layer.attn_residual.post.weight
    x = x + a * attention(layer)(x)
    return x + a * mlp(layer)(x)


@pytest.mark.parametrize("depth", [1, 4])
def test_rezero_multiplies_both_branches_of_a_layer_by_one_number(depth: int) -> None:
    assert_follows(model_of("rezero", depth=depth), block)


def test_rezero_has_one_number_a_layer_and_a_final_norm() -> None:
    model = model_of("rezero")
    assert norm_names(model) == names_in_layers(4, "attn_residual.post")
    assert model.model.layers[0].attn_residual.post.weight.shape == (1,)


def test_the_shared_number_gets_the_gradient_of_both_branches() -> None:
    model = model_of("rezero", depth=1)
    layer = model.model.layers[0]
    embedded = model.model.embed_tokens(tokens()).detach()
    a = layer.attn_residual.post.weight
    a1, a2 = (a.detach().clone().requires_grad_() for _ in range(2))
    h = embedded + a1 * attention(layer)(embedded)
    (h + a2 * mlp(layer)(h)).square().sum().backward()
    out = model.model(tokens(), output_hidden_states=True)
    x = out.hidden_states[0]
    h = x + a * attention(layer)(x)
    block(1, layer, x).square().sum().backward()
    torch.testing.assert_close(a.grad, a1.grad + a2.grad, **TOLERANCE[torch.float64])
    assert (a1.grad * a2.grad).item() != 0


def test_every_block_starts_as_the_identity() -> None:
    model = build_model(build_config(SHAPE, placement="rezero"))
    first, *_, last, _ = model.model(tokens(), output_hidden_states=True).hidden_states
    assert torch.equal(first, last)


def test_norm_none_leaves_no_norm_at_all() -> None:
    model = model_of("rezero", norm="none")
    assert norm_names(model) == names_in_layers(4, "attn_residual.post", final=False)
    ids = tokens()
    x = model.model.embed_tokens(ids)
    for layer in model.model.layers:
        x = block(0, layer, x)
    wanted = same(x) @ model.lm_head.weight.T
    torch.testing.assert_close(model(ids).logits, wanted, **TOLERANCE[torch.float64])
