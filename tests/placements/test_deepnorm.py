"""DeepNorm: y = N(alpha x + F(x)), init times beta (Wang et al. 2022)."""

import pytest
import torch
from schemes import SHAPE, TOLERANCE, tokens
from wiring import Block, assert_follows, attention, mlp, model_of, names_in_layers, norm_names, rms

from llmnorm import build_config
from llmnorm.errors import ConfigError
from llmnorm.modeling.initialization import Matrix, deepnorm

pytestmark = pytest.mark.fast

# Layers, alpha = (2 N)^(1/4), beta = (8 N)^(-1/4), rounded: a flipped exponent gives 3.13 for 12.
TABLE = [(12, 2.213, 0.3195), (24, 2.632, 0.2687), (32, 2.828, 0.2500), (100, 3.761, 0.1880)]


def block_at(depth: int) -> Block:
    alpha = (2 * depth) ** 0.25

    def block(number: int, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = rms(layer.attn_residual.out)(alpha * x + attention(layer)(x))
        return rms(layer.mlp_residual.out)(alpha * x + mlp(layer)(x))

    return block


@pytest.mark.parametrize("depth", [1, 4])
def test_deepnorm_multiplies_the_skip_by_alpha_and_normalizes_the_sum(depth: int) -> None:
    assert_follows(model_of("deepnorm", depth=depth), block_at(depth), final=False)


@pytest.mark.parametrize(("depth", "alpha", "beta"), TABLE)
def test_alpha_and_beta_are_the_papers(depth: int, alpha: float, beta: float) -> None:
    config = build_config(SHAPE | {"num_hidden_layers": depth}, placement="deepnorm")
    skips = {layer[kind]["skip"]["value"] for layer in config.residuals for kind in ("attn", "mlp")}
    assert len(skips) == 1
    assert skips.pop() == pytest.approx(alpha, rel=3e-4)
    square = {
        "number": 1,
        "depth": depth,
        "hidden_size": 50,
        "fan_in": 50,
        "fan_out": 50,
        "initializer_range": 9.0,
    }
    ratio = deepnorm(Matrix(name="v_proj", **square)) / deepnorm(Matrix(name="q_proj", **square))
    assert ratio == pytest.approx(beta, rel=3e-4)


def test_deepnorm_is_post_ln_with_branches_divided_by_alpha() -> None:
    """N(alpha x + f) = N(x + f / alpha), with eps / alpha^2."""
    deep = model_of("deepnorm")
    alpha = 8**0.25
    post = model_of({"name": "post_ln"}, norm={"op": "rmsnorm", "eps": 1e-6 / alpha**2})
    weights = {name: value.clone() for name, value in deep.state_dict().items()}
    for name in weights:
        if "o_proj" in name or "down_proj" in name:
            weights[name] /= alpha
    post.load_state_dict(weights)
    torch.testing.assert_close(
        deep(tokens()).logits, post(tokens()).logits, **TOLERANCE[torch.float64]
    )


def test_deepnorm_has_no_final_norm_and_no_parameter_on_the_skip() -> None:
    slots = ("attn_residual.out", "mlp_residual.out")
    assert norm_names(model_of("deepnorm")) == names_in_layers(4, *slots, final=False)


def test_deepnorm_brings_its_own_init() -> None:
    assert build_config("debug", placement="deepnorm").init == "deepnorm"
    assert build_config("debug", placement="deepnorm", init="plain").init == "plain"


def test_alpha_is_no_option_since_the_depth_fixes_it() -> None:
    with pytest.raises(ConfigError, match="deepnorm has no option 'alpha'; its options: none"):
        build_config("debug", placement={"name": "deepnorm", "alpha": 2.8284})
