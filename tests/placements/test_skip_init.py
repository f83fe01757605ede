"""SkipInit: one learned number on each branch of Pre-LN, first 0 (De and Smith 2020)."""

import pytest
import torch
from schemes import SHAPE, tokens
from wiring import assert_follows, attention, mlp, model_of, names_in_layers, norm_names, rms

from llmnorm import build_config, build_model
from llmnorm.errors import ConfigError

pytestmark = pytest.mark.fast

SLOTS = ("attn_residual.pre", "attn_residual.post", "mlp_residual.pre", "mlp_residual.post")


def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    attn, feed = layer.attn_residual, layer.mlp_residual
    x = x + attn.post.weight * attention(layer)(rms(attn.pre)(x))
    return x + feed.post.weight * mlp(layer)(rms(feed.pre)(x))


@pytest.mark.parametrize("depth", [1, 4])
def test_skip_init_multiplies_each_branch_by_its_own_number(depth: int) -> None:
    assert_follows(model_of("skip_init", depth=depth), block)


def test_skip_init_adds_one_number_a_branch_to_pre_ln() -> None:
    model = model_of("skip_init")
    assert norm_names(model) == names_in_layers(4, *SLOTS)
    assert model.model.layers[2].mlp_residual.post.weight.shape == (1,)


def test_every_block_starts_as_the_identity() -> None:
    model = build_model(build_config(SHAPE, placement="skip_init"))
    first, *_, last, _ = model.model(tokens(), output_hidden_states=True).hidden_states
    assert torch.equal(first, last)


def test_the_number_of_a_silent_branch_has_a_gradient_and_its_matrices_have_none() -> None:
    model = build_model(build_config(SHAPE, placement="skip_init"))
    model(tokens(), labels=tokens()).loss.backward()
    layer = model.model.layers[1]
    assert layer.attn_residual.post.weight.grad.abs().item() > 0
    assert not layer.self_attn.o_proj.weight.grad.any()


def test_the_lns_papers_start_is_an_option() -> None:
    model = build_model(build_config(SHAPE, placement={"name": "skip_init", "value": 4**-0.5}))
    assert model.model.layers[3].attn_residual.post.weight.tolist() == [0.5]
    with pytest.raises(ConfigError, match=r"skip_init\.value is 'small'; expected a number"):
        build_config(SHAPE, placement={"name": "skip_init", "value": "small"})


def test_without_a_norm_it_is_the_original() -> None:
    model = build_model(build_config(SHAPE, norm="none", placement="skip_init"))
    assert norm_names(model) == names_in_layers(
        4, "attn_residual.post", "mlp_residual.post", final=False
    )
