"""How matrices are held: weight normalization, and a head of unit rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from schemes import SHAPE, TOLERANCE, tokens
from torch import nn
from torch.nn.functional import linear as apply_linear

from llmnorm import LlmNormForCausalLM, build_config, build_model, self_test
from llmnorm.errors import ConfigError, SelfTestError
from llmnorm.modeling.weights import UnitRowLinear, WeightNormLinear, WeightSpec, unit_dim
from llmnorm.testing import check_scheme


def _layer(bias: bool = True) -> WeightNormLinear:
    layer = WeightNormLinear(5, 3, bias=bias).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def _input() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 5, dtype=torch.float64, generator=generator)


# --- weight normalization ---------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("bias", [False, True])
def test_weight_norm_gives_every_row_its_learned_length(bias: bool) -> None:
    layer, x = _layer(bias), _input()
    wanted = torch.zeros(4, 3, dtype=torch.float64)
    for row in range(3):
        v = layer.weight[row]
        wanted[:, row] = layer.length[row] * (x @ v) / v.square().sum().sqrt()
    wanted = wanted + (layer.bias if bias else 0)
    torch.testing.assert_close(layer(x), wanted, **TOLERANCE[torch.float64])


@pytest.mark.fast
def test_its_gradients_are_the_papers_equation_3() -> None:
    """With G the gradient of the product matrix: dg = G . v/|v|; dv = g/|v| (G - dg v/|v|)."""
    layer, x = _layer(), _input()
    layer(x).square().sum().backward()
    length, v = layer.length.detach()[:, None], layer.weight.detach()
    direction = v / v.norm(dim=1, keepdim=True)
    matrix = (length * direction).requires_grad_()
    apply_linear(x, matrix, layer.bias.detach()).square().sum().backward()
    gradient = matrix.grad
    along = (gradient * direction).sum(1, keepdim=True)
    torch.testing.assert_close(layer.length.grad, along.squeeze(1), **TOLERANCE[torch.float64])
    wanted = length / v.norm(dim=1, keepdim=True) * (gradient - along * direction)
    torch.testing.assert_close(layer.weight.grad, wanted, **TOLERANCE[torch.float64])
    across = (layer.weight.grad * v).sum(1)
    torch.testing.assert_close(across, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-10)
    names, values = zip(*layer.named_parameters(), strict=True)
    values = tuple(value.detach().requires_grad_() for value in values)

    def forward(x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x.requires_grad_(), *values))


@pytest.mark.fast
def test_the_length_of_v_means_nothing() -> None:
    layer, x = _layer(), _input()
    wanted = layer(x)
    with torch.no_grad():
        layer.weight *= torch.tensor([[0.1], [2.0], [30.0]])
    torch.testing.assert_close(layer(x), wanted, **TOLERANCE[torch.float64])


@pytest.mark.fast
@pytest.mark.parametrize("placement", ["pre_ln", "deepnorm"])
def test_a_model_under_weight_norm_starts_as_the_plain_one(placement: str) -> None:
    config = {"placement": placement, "attention_bias": True}
    plain = build_model(build_config(SHAPE, **config), seed=2)
    normed = build_model(build_config(SHAPE, **config, weights="weight_norm"), seed=2)
    held = [m for m in normed.modules() if isinstance(m, WeightNormLinear)]
    assert len(held) == 4 * 7
    assert type(normed.lm_head) is nn.Linear
    for layer in held:
        assert torch.equal(layer.length, layer.weight.norm(dim=1))
    for name, weight in plain.state_dict().items():
        assert torch.equal(normed.state_dict()[name], weight)
    one, other = (model.eval()(tokens()).logits for model in (plain, normed))
    torch.testing.assert_close(other, one, **TOLERANCE[torch.float32])


@pytest.mark.fast
def test_weight_norm_survives_saving_loading_and_the_meta_device(tmp_path: Path) -> None:
    config = build_config(SHAPE, weights="weight_norm")
    model = build_model(config, seed=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.125
    model.save_pretrained(tmp_path)
    loaded = LlmNormForCausalLM.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert torch.equal(loaded(tokens()).logits, model.eval()(tokens()).logits)
    with torch.device("meta"):
        empty = LlmNormForCausalLM(config)
    empty.to_empty(device="cpu")
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.fill_(torch.nan)
    empty.init_weights()
    for name, weight in build_model(config, seed=2).state_dict().items():
        assert torch.equal(empty.state_dict()[name], weight), name


@pytest.mark.fast
def test_lengths_missing_from_a_plain_checkpoint_are_those_of_its_rows(tmp_path: Path) -> None:
    plain = build_model(build_config(SHAPE), seed=2).eval()
    plain.save_pretrained(tmp_path)
    config = build_config(SHAPE, weights="weight_norm")
    loaded, info = LlmNormForCausalLM.from_pretrained(
        tmp_path, config=config, output_loading_info=True
    )
    assert len(info["missing_keys"]) == 4 * 7
    assert all(name.endswith("_proj.length") for name in info["missing_keys"])
    wanted = plain(tokens()).logits
    torch.testing.assert_close(loaded(tokens()).logits, wanted, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("weights", ["weight_norm", "unit"])
def test_the_facts_of_every_scheme_hold_under_it(weights: str) -> None:
    """Loading without llmnorm, compiled as eager, bfloat16 finite, and the rest."""
    check_scheme("pre_ln", weights=weights, parametrization={"name": "mup", "base_width": 16})


# --- unit rows --------------------------------------------------------------------------------


@pytest.mark.fast
def test_unit_rows_lie_along_the_hidden_axis() -> None:
    assert unit_dim("model.layers.3.mlp.down_proj") == unit_dim("o_proj") == 0
    for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        assert unit_dim(f"model.layers.0.self_attn.{name}") == 1
    assert unit_dim("model.embed_tokens") == unit_dim("lm_head") == 1


@pytest.mark.fast
def test_the_scaled_draws_of_unit_rows_are_those_of_the_plain_model() -> None:
    plain = build_model(build_config(SHAPE), seed=2).state_dict()
    unit = build_model(build_config(SHAPE, weights="unit"), seed=2).state_dict()
    for name, weight in unit.items():
        if weight.ndim == 2:
            dim = unit_dim(name.removesuffix(".weight"))
            wanted = plain[name] / plain[name].norm(dim=dim, keepdim=True)
            torch.testing.assert_close(weight, wanted)


@pytest.mark.fast
def test_a_unit_row_head_scores_with_directions_alone() -> None:
    head, x = UnitRowLinear(5, 3, bias=False).double(), _input()
    wanted = torch.stack([x @ row / row.square().sum().sqrt() for row in head.weight], dim=1)
    torch.testing.assert_close(head(x), wanted, **TOLERANCE[torch.float64])
    with torch.no_grad():
        head.weight *= torch.tensor([[0.1], [2.0], [30.0]])
    torch.testing.assert_close(head(x), wanted, **TOLERANCE[torch.float64])
    assert torch.autograd.gradcheck(lambda given: head(given), x.requires_grad_())


@pytest.mark.fast
@pytest.mark.parametrize(
    ("norm", "tied", "head"),
    [
        ("fixnorm", True, UnitRowLinear),
        ("fixnorm", False, nn.Linear),
        ("rmsnorm", True, nn.Linear),
    ],
)
def test_the_head_has_unit_rows_where_it_is_a_fixnorm_embedding(
    norm: str, tied: bool, head: type
) -> None:
    embedding = {"treatment": "norm", "norm": norm}
    model = build_model(build_config(SHAPE, embedding=embedding, tie_word_embeddings=tied))
    assert type(model.lm_head) is head


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("weightnorm", "weights is 'weightnorm'; expected one of plain, weight_norm, unit"),
        ({"kind": "unit", "interval_steps": 2}, "unit has no option 'interval_steps'"),
        ({"kind": "project", "every": 2}, "no option 'every'; its options: interval_steps"),
        ({"kind": "project", "interval_steps": 0}, "interval_steps is 0; expected a whole number"),
        ({"kind": "lawn", "free_steps": 0.5}, "free_steps is 0.5; expected a whole number"),
        (None, "expected a name, or a mapping"),
    ],
)
def test_what_cannot_be_is_refused_by_name(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(SHAPE, weights=value)


@pytest.mark.fast
def test_a_spec_reads_its_options() -> None:
    assert WeightSpec.parse({"kind": "lawn", "free_steps": 100}).free_steps == 100
    assert WeightSpec.parse("project").interval_steps == 1


@pytest.mark.fast
def test_the_self_test_measures_rows_of_length_one_and_weight_norms_lengths() -> None:
    unit = build_model(build_config(SHAPE, weights="unit"))
    with torch.no_grad():
        unit.model.layers[1].mlp.down_proj.weight[:, 3] *= 1.5
        unit.model.layers[1].mlp.down_proj.weight[:, 4] *= 0.5
    with pytest.raises(SelfTestError, match=r"1.mlp.down_proj.weight has rows whose"):
        self_test(unit, fresh=True)
    normed = build_model(build_config(SHAPE, weights="weight_norm"))
    with torch.no_grad():
        normed.model.layers[2].self_attn.q_proj.length[0] += 0.01
    with pytest.raises(SelfTestError, match=r"2.self_attn.q_proj.length has rows whose"):
        self_test(normed, fresh=True)
    self_test(normed, fresh=False)
