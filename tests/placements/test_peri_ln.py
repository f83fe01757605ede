"""Peri-LN: y = x + N'(F(N(x))) (Kim et al. 2025), the placement of Gemma 2 and 3."""

import pytest
import torch
from schemes import SHAPE, tokens
from wiring import assert_follows, attention, mlp, model_of, names_in_layers, norm_names, rms

from llmnorm import build_config, build_model
from llmnorm.errors import ConfigError

pytestmark = pytest.mark.fast


def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    attn, feed = layer.attn_residual, layer.mlp_residual
    x = x + rms(attn.post)(attention(layer)(rms(attn.pre)(x)))
    return x + rms(feed.post)(mlp(layer)(rms(feed.pre)(x)))


@pytest.mark.parametrize("depth", [1, 4])
def test_peri_ln_normalizes_around_each_sublayer(depth: int) -> None:
    assert_follows(model_of("peri_ln", depth=depth), block)


def test_peri_ln_has_four_norms_a_layer_one_on_the_embedding_and_a_final_one() -> None:
    slots = [f"{part}_residual.{slot}" for part in ("attn", "mlp") for slot in ("pre", "post")]
    wanted = names_in_layers(4, *slots) | {"embedding_norm.weight"}
    assert norm_names(model_of("peri_ln")) == wanted
    raw = norm_names(model_of("peri_ln", embedding="raw"))
    assert raw == wanted - {"embedding_norm.weight"}


def test_peri_ln_normalizes_the_embedding_by_default() -> None:
    model = build_model(build_config(SHAPE, placement="peri_ln")).double()
    start = model.model(tokens(), output_hidden_states=True).hidden_states[0]
    rows = model.model.embed_tokens(tokens())
    wanted = rows / torch.sqrt(rows.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(start, wanted)


@torch.no_grad()
def test_every_branch_writes_updates_of_rms_1_at_init_whatever_its_weights() -> None:
    """So the stream starts at RMS 1 and its mean square grows by about 1 a sublayer."""
    model = build_model(build_config(SHAPE | {"num_hidden_layers": 6}, placement="peri_ln"))
    model.double()
    for layer in model.model.layers:  # branches far above sqrt(eps)
        layer.self_attn.o_proj.weight *= 1e4
        layer.mlp.down_proj.weight *= 1e5
    states = model.model(tokens(4, 32), output_hidden_states=True).hidden_states
    written = []
    for layer in model.model.layers:
        for residual in (layer.attn_residual, layer.mlp_residual):
            residual.post.register_forward_hook(lambda _m, _i, y: written.append(y))
    model.model(tokens(4, 32))
    assert len(written) == 12
    for y in written:
        rms_of_update = y.square().mean(-1).sqrt()
        torch.testing.assert_close(rms_of_update, torch.ones_like(rms_of_update), rtol=1e-2, atol=0)
    start = states[0].square().mean()
    torch.testing.assert_close(start, torch.ones_like(start), rtol=1e-2, atol=0)


def test_peri_ln_has_no_options() -> None:
    with pytest.raises(ConfigError, match="peri_ln has no option 'post'"):
        build_config("debug", placement={"name": "peri_ln", "post": True})
