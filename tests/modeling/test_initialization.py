"""Initial weights: the std of every matrix as its scheme asks, drawn by (seed, name) alone."""

import math
from typing import Any

import pytest
import torch
from schemes import FULL, SHAPE
from torch import nn
from transformers import AutoModelForCausalLM

from llmnorm import LlmNormForCausalLM, LlmNormModel, build_config, build_model
from llmnorm.errors import ConfigError
from llmnorm.modeling.initialization import INIT_POLICIES, InitSpec
from llmnorm.placements import parse_placement

# Unequal widths, so that a fan taken from the wrong side shows; v_proj is the smallest matrix.
WIDE: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
}
DEPTH, WIDTH, INNER, ATTN, KV = 3, 128, 384, 192, 96
SIGMA = 0.02


def xavier(one: int, other: int) -> float:
    return math.sqrt(2 / (one + other))


DEEPNORM = (8 * DEPTH) ** -0.25
SUB_LN = math.sqrt(math.log(2 * DEPTH))
Q, K, V, O, GATE, UP, DOWN = (  # noqa: E741 (the letters of the papers)
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)


def wanted(policy: str, number: int, sigma: float = SIGMA) -> dict[str, float]:
    """Std of every projection of layer `number` (1-based), as the papers or their code have it."""
    table = dict.fromkeys((Q, K, V, O, GATE, UP, DOWN), sigma)
    if policy == "scaled":
        table[O] = table[DOWN] = sigma / math.sqrt(2 * DEPTH)
    elif policy == "depth_scaled":
        table[O] = table[DOWN] = sigma / math.sqrt(2 * number)
    elif policy == "small":
        table = dict.fromkeys(table, math.sqrt(2 / (5 * WIDTH)))
    elif policy == "fixup":
        table[V] = table[GATE] = table[UP] = sigma / math.sqrt(2 * DEPTH)
        table[O] = table[DOWN] = 0.0
    elif policy in ("deepnorm", "sub_ln"):
        gain = {"deepnorm": DEEPNORM, "sub_ln": SUB_LN}[policy]
        table = {
            Q: xavier(WIDTH, ATTN),
            K: xavier(WIDTH, KV),
            V: xavier(WIDTH, KV) * gain,
            O: xavier(ATTN, WIDTH) * gain,
            GATE: xavier(WIDTH, INNER) * gain,
            UP: xavier(WIDTH, INNER) * gain,
            DOWN: xavier(INNER, WIDTH) * gain,
        }
    else:
        assert policy == "plain"
    return table


def assert_std(name: str, weight: torch.Tensor, std: float) -> None:
    """Within 5 standard errors, 5 / sqrt(2 n), of a normal sample's std; and mean near zero."""
    n = weight.numel()
    assert weight.double().std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n)), name
    assert abs(weight.double().mean().item()) <= 5 * std / math.sqrt(n), name


def assert_matrices(
    model: nn.Module, policy: str, *, embedding: float = SIGMA, sigma: float = SIGMA
) -> None:
    seen = 0
    for i, layer in enumerate(model.model.layers):
        for name, std in wanted(policy, i + 1, sigma).items():
            part = layer.self_attn if name in (Q, K, V, O) else layer.mlp
            assert_std(f"layers.{i}.{name}", getattr(part, name).weight, std)
            seen += 1
    assert_std("embed_tokens", model.model.embed_tokens.weight, embedding)
    assert_std("lm_head", model.lm_head.weight, SIGMA)
    linears = sum(isinstance(module, nn.Linear | nn.Embedding) for module in model.modules())
    assert linears == seen + 2  # no matrix is left unchecked


def test_the_wide_shape_tells_every_policy_apart_in_every_matrix_it_changes() -> None:
    tolerance = 5 / math.sqrt(2 * WIDTH * KV)
    assert tolerance < 0.04
    for policy in set(INIT_POLICIES) - {"plain"}:
        ratios = [wanted(policy, 2)[name] / SIGMA for name in (O, DOWN)]
        assert all(abs(ratio - 1) > 3 * tolerance for ratio in ratios)


@pytest.mark.fast
@pytest.mark.parametrize("policy", sorted(INIT_POLICIES))
def test_the_std_of_every_matrix_is_its_policys(policy: str) -> None:
    assert_matrices(build_model(build_config(WIDE, init=policy)), policy)


@pytest.mark.fast
@pytest.mark.parametrize(("norm", "placement"), FULL)
def test_the_std_of_every_matrix_is_its_schemes(norm: str, placement: str) -> None:
    rule = parse_placement(placement)
    model = build_model(build_config(WIDE, norm=norm, placement=placement), seed=5)
    if rule.weights == "unit":
        assert_unit(model)
        return
    sigma = {"completep": SIGMA * math.sqrt(256 / WIDTH)}.get(placement, SIGMA)
    assert_matrices(model, rule.init, sigma=sigma)


def assert_unit(model: nn.Module) -> None:
    """Rows of length 1 along the hidden axis: what writes the stream has them as columns."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            lengths = module.weight.norm(dim=0 if name.endswith((O, DOWN)) else 1)
            torch.testing.assert_close(lengths, torch.ones_like(lengths), msg=name)


@pytest.mark.fast
@pytest.mark.parametrize("policy", sorted(INIT_POLICIES))
def test_unit_rows_replace_any_policy(policy: str) -> None:
    assert_unit(build_model(build_config(WIDE, init=policy, weights="unit")))


@pytest.mark.fast
def test_a_plain_mlp_and_biases_follow_the_policy_too() -> None:
    config = build_config(
        WIDE, placement="deepnorm", mlp="plain", attention_bias=True, mlp_bias=True
    )
    model = build_model(config)
    layer = model.model.layers[1]
    assert_std("up", layer.mlp.up_proj.weight, wanted("deepnorm", 2)[UP])
    assert_std("down", layer.mlp.down_proj.weight, wanted("deepnorm", 2)[DOWN])
    biases = [p for name, p in model.named_parameters() if name.endswith("proj.bias")]
    assert len(biases) == DEPTH * 6
    assert not any(bias.any() for bias in biases)


@pytest.mark.fast
@pytest.mark.parametrize("std", [0.005, 0.1])
def test_initializer_range_sets_plain_matrices_embedding_and_head(std: float) -> None:
    model = build_model(build_config(WIDE, initializer_range=std))
    assert_std("q", model.model.layers[0].self_attn.q_proj.weight, std)
    assert_std("embed", model.model.embed_tokens.weight, std)
    assert_std("head", model.lm_head.weight, std)
    xavier_model = build_model(build_config(WIDE, placement="deepnorm", initializer_range=std))
    assert_std("q", xavier_model.model.layers[0].self_attn.q_proj.weight, xavier(WIDTH, ATTN))
    assert_std("embed", xavier_model.model.embed_tokens.weight, std)


@pytest.mark.fast
def test_embedding_std_changes_the_embedding_alone() -> None:
    large = (2 / 5) ** 0.5  # the Mix-LN and GPAS repositories' "scaled embed"
    config = build_config(WIDE, init={"policy": "scaled", "embedding_std": large})
    assert_matrices(build_model(config), "scaled", embedding=large)


@pytest.mark.fast
@pytest.mark.parametrize("embedding_std", [None, 0.5])
def test_a_tied_head_is_the_embedding_and_has_its_std(embedding_std: float | None) -> None:
    init = {"policy": "plain", "embedding_std": embedding_std}
    model = build_model(build_config(WIDE, tie_word_embeddings=True, init=init))
    untied = build_model(build_config(WIDE, init=init))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_std("tied", model.lm_head.weight, embedding_std or SIGMA)
    assert torch.equal(model.model.embed_tokens.weight, untied.model.embed_tokens.weight)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("init", "wanted_scale"),
    [
        ({"policy": "plain"}, 50.0),
        ({"policy": "plain", "embedding_std": 0.1}, 10.0),
    ],
)
def test_the_unit_rms_scale_starts_the_stream_at_rms_1(
    init: dict[str, Any], wanted_scale: float
) -> None:
    model = build_model(build_config(WIDE, init=init, embedding="scale"))
    assert model.model.embedding_scale.weight.tolist() == pytest.approx([wanted_scale])
    ids = torch.arange(1000)[None]
    start = model.model(ids, output_hidden_states=True).hidden_states[0]
    assert start.square().mean().sqrt().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.fast
def test_the_sqrt_dim_scale_is_the_papers() -> None:
    config = build_config(WIDE, embedding={"treatment": "scale", "init": "sqrt_dim"})
    assert build_model(config).model.embedding_scale.weight.item() == pytest.approx(128**0.5)


# --- a draw is a function of (seed, name) -----------------------------------------------------


def matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    ends = ("_proj.weight", "embed_tokens.weight", "lm_head.weight")
    return {name: value for name, value in model.state_dict().items() if name.endswith(ends)}


@pytest.mark.fast
def test_schemes_with_extra_norms_start_from_the_same_matrices() -> None:
    pre = matrices(build_model(build_config(SHAPE, placement="pre_ln"), seed=3))
    for placement in ("peri_ln", "normformer", "post_ln", "lns"):
        for norm in ("rmsnorm", "derf"):
            config = build_config(SHAPE, norm=norm, placement=placement, qk_norm="per_head")
            other = matrices(build_model(config, seed=3))
            assert other.keys() == pre.keys()
            assert all(torch.equal(pre[name], other[name]) for name in pre)


@pytest.mark.fast
def test_policies_scale_the_same_draws() -> None:
    plain = matrices(build_model(build_config(SHAPE), seed=3))
    scaled = matrices(build_model(build_config(SHAPE, init="scaled"), seed=3))
    for name, weight in plain.items():
        factor = 8**-0.5 if "o_proj" in name or "down_proj" in name else 1.0
        torch.testing.assert_close(scaled[name], factor * weight)


@pytest.mark.fast
def test_a_deeper_or_wider_vocabulary_model_keeps_the_draws_of_shared_names() -> None:
    small = matrices(build_model(build_config(SHAPE), seed=3))
    deep = matrices(build_model(build_config(SHAPE | {"num_hidden_layers": 6}), seed=3))
    assert all(torch.equal(deep[name], weight) for name, weight in small.items())


@pytest.mark.fast
def test_seeds_differ_in_every_matrix_and_equal_seeds_in_none() -> None:
    one, same, other = (matrices(build_model(build_config(SHAPE), seed=seed)) for seed in (3, 3, 4))
    for name, weight in one.items():
        assert torch.equal(weight, same[name])
        assert not torch.equal(weight, other[name])
    drawn = [weight.flatten()[:64] for weight in one.values()]
    assert len({tuple(row.tolist()) for row in drawn}) == len(drawn)  # no two names share a draw


@pytest.mark.fast
def test_build_model_neither_reads_nor_changes_torchs_global_generator() -> None:
    config = build_config(SHAPE)
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.rand(seed)
        before, initial = torch.get_rng_state(), torch.initial_seed()
        models.append(build_model(config, seed=9))
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.initial_seed() == initial == seed
    one, two = (model.state_dict() for model in models)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.fast
def test_build_model_leaves_the_generators_of_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    reseeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded.append)
    build_model(build_config(SHAPE), seed=9)
    assert not reseeded


@pytest.mark.fast
def test_the_order_of_construction_does_not_matter() -> None:
    config = build_config(SHAPE)
    whole = build_model(config, seed=3)
    torch.manual_seed(3)
    trunk = LlmNormModel(config)  # no head
    for name, weight in trunk.state_dict().items():
        assert torch.equal(weight, whole.state_dict()[f"model.{name}"])
    torch.rand(5)  # draws in between do not matter either
    again = LlmNormForCausalLM(config)
    assert all(
        torch.equal(weight, whole.state_dict()[name]) for name, weight in again.state_dict().items()
    )


# --- meta device, loading ---------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("placement", ["pre_ln", "deepnorm", "normformer", "fixup", "rezero"])
@pytest.mark.parametrize("norm", ["rmsnorm", "derf"])
def test_a_model_built_on_the_meta_device_is_initialized_to_the_same_weights(
    norm: str, placement: str
) -> None:
    weights = "unit" if placement == "fixup" else "plain"
    config = build_config(SHAPE, norm=norm, placement=placement, weights=weights)
    wanted_weights = build_model(config, seed=3).state_dict()
    with torch.device("meta"):
        model = LlmNormForCausalLM(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    torch.manual_seed(3)
    model.init_weights()
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, wanted_weights[name]), name


@pytest.mark.fast
def test_from_config_draws_by_the_global_seed() -> None:
    config = build_config(SHAPE)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    wanted_weights = build_model(config, seed=3).state_dict()
    assert type(model) is LlmNormForCausalLM
    assert all(torch.equal(v, wanted_weights[k]) for k, v in model.state_dict().items())


@pytest.mark.fast
@pytest.mark.parametrize("norm", ["layernorm", "derf"])
def test_from_pretrained_leaves_every_loaded_tensor_untouched(norm: str, tmp_path: Any) -> None:
    config = build_config(SHAPE, norm=norm, placement="normformer", attention_bias=True)
    model = build_model(config, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.123
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


@pytest.mark.fast
def test_a_tensor_missing_from_a_checkpoint_is_drawn_as_in_a_fresh_model(tmp_path: Any) -> None:
    config = build_config(SHAPE)
    build_model(config, seed=3).model.save_pretrained(tmp_path)  # the trunk alone: no head
    torch.manual_seed(3)
    loaded, info = LlmNormForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight"}
    wanted_weights = build_model(config, seed=3).state_dict()
    assert all(torch.equal(v, wanted_weights[k]) for k, v in loaded.state_dict().items())


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.fast
def test_unknown_policies_and_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown init 'xavier'; known: plain, scaled"):
        InitSpec.parse("xavier")
    with pytest.raises(ValueError, match="init has no key 'std'; its keys: policy, embedding_std"):
        InitSpec.parse({"policy": "plain", "std": 0.02})
    with pytest.raises(ValueError, match=r"init.embedding_std is 0; expected a number above 0"):
        InitSpec.parse({"embedding_std": 0})
    for value in (0.0, -0.02, "0.02"):
        with pytest.raises(ConfigError, match="initializer_range"):
            build_config(SHAPE, initializer_range=value)


@pytest.mark.fast
@pytest.mark.parametrize("weights", ["plain", "unit"])
def test_a_unit_rms_embedding_starts_the_stream_at_rms_1(weights: str) -> None:
    model = build_model(build_config(SHAPE, embedding="scale", weights=weights))
    ids = torch.arange(SHAPE["vocab_size"])[None]
    x = model.model.embedding_scale(model.model.embed_tokens(ids))
    assert x.square().mean().sqrt().item() == pytest.approx(1, abs=0.05)
