"""The configuration: no field is silently ignored, and none may part from the resolved wiring."""

import copy
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from schemes import FULL, SHAPE, tokens
from transformers import AutoConfig, AutoModelForCausalLM

from llmnorm import LlmNormConfig, LlmNormForCausalLM, build_config, build_model
from llmnorm.errors import ConfigError

pytestmark = pytest.mark.fast

# Field -> another value, and whether the model changes or refuses to be built.
EFFECTS: dict[str, tuple[Any, str]] = {
    "vocab_size": (101, "changes"),
    "hidden_size": (48, "raises"),
    "intermediate_size": (64, "changes"),
    "num_hidden_layers": (5, "raises"),
    "num_attention_heads": (8, "raises"),
    "num_key_value_heads": (4, "raises"),
    "head_dim": (16, "raises"),
    "hidden_act": ("gelu", "changes"),
    "mlp": ("plain", "changes"),
    "position": ("none", "changes"),
    "rope_parameters": ({"rope_type": "default", "rope_theta": 500.0}, "changes"),
    "attention_bias": (True, "changes"),
    "attention_dropout": (0.5, "changes"),
    "mlp_bias": (True, "changes"),
    "initializer_range": (0.05, "changes"),
    "tie_word_embeddings": (True, "changes"),
    "norm": ({"op": "rmsnorm", "eps": 1e-3}, "raises"),
    "placement": ({"name": "lns"}, "raises"),
    "qk_norm": ("full_width", "raises"),
    "embedding": ("norm", "changes"),
    "init": ("scaled", "changes"),
    "residuals": ([{"attn": {}, "mlp": {}}] * 4, "raises"),
    "final_norm": ({"op": "rmsnorm", "eps": 1e-3}, "raises"),
    "logits": ({"op": "gain"}, "raises"),
    "streams": ({"scale": 2.0}, "raises"),
    "wiring": ("0" * 16, "raises"),
    "weights": ("weight_norm", "changes"),
    "parametrization": ({"name": "mup", "base_width": 16}, "raises"),
}

# Field -> another value, and why the model does not depend on it.
INFORMATIONAL: dict[str, tuple[Any, str]] = {
    "max_position_embeddings": (128, "a length for users; RoPE has no table and no limit"),
    "use_cache": (False, "whether generation keeps keys and values; not what they are"),
    "pad_token_id": (0, "read by generation and collators"),
    "bos_token_id": (1, "read by generation"),
    "eos_token_id": (2, "read by generation"),
    "dtype": ("bfloat16", "the dtype that from_pretrained loads; a fresh model is float32"),
    "transformers_version": ("5.0.0", "who wrote the file"),
    "architectures": (["LlmNormForCausalLM"], "who wrote the file"),
    "output_hidden_states": (True, "what forward returns beside the logits"),
    "return_dict": (True, "the container that forward returns; false fails in their Llama too"),
    "chunk_size_feed_forward": (2, "transformers' own; read by no decoder"),
    "is_encoder_decoder": (False, "transformers' own; always false here"),
    "id2label": ({0: "a"}, "classification heads"),
    "label2id": ({"a": 0}, "classification heads"),
    "problem_type": ("regression", "classification heads"),
}

BASES = {
    "pre_ln": {"placement": "pre_ln"},
    "normformer": {"placement": "normformer", "embedding": "scale"},
    "deepnorm": {"placement": "deepnorm"},
}


def base_config(name: str) -> LlmNormConfig:
    return build_config(SHAPE, qk_norm="per_head", **BASES[name])


@torch.no_grad()
def fingerprint(config: LlmNormConfig) -> dict[str, torch.Tensor]:
    """Every fresh weight, and the logits in training mode, where dropout shows too."""
    model = build_model(config, seed=1).train()
    generator = torch.Generator().manual_seed(5)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    torch.manual_seed(0)
    return {**weights, "logits": model(tokens())[0]}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def changed(way: str, config: LlmNormConfig, field: str, value: Any, folder: Path) -> LlmNormConfig:
    """The config with one field changed, by attribute or while it is read from a folder."""
    if way == "attribute":
        config = copy.deepcopy(config)
        setattr(config, field, value)
        return config
    config.save_pretrained(folder)
    return AutoConfig.from_pretrained(folder, **{field: value})


def test_every_field_is_listed_with_its_effect_or_with_the_reason_for_none() -> None:
    assert not set(EFFECTS) & set(INFORMATIONAL)
    assert {field.name for field in fields(LlmNormConfig)} == set(EFFECTS) | set(INFORMATIONAL)


@pytest.mark.parametrize(
    ("base", "way"),
    [("pre_ln", "attribute"), ("normformer", "from_pretrained"), ("deepnorm", "attribute")],
)
@pytest.mark.parametrize("field", sorted(EFFECTS))
def test_a_changed_field_changes_the_model_or_raises(
    base: str, field: str, way: str, tmp_path: Path
) -> None:
    config = base_config(base)
    value, effect = EFFECTS[field]
    if effect == "raises":
        with pytest.raises(ValueError, match="apply the placement again"):
            build_model(changed(way, config, field, value, tmp_path))
    else:
        found = fingerprint(changed(way, config, field, value, tmp_path))
        assert not equal(found, fingerprint(config))


@pytest.mark.parametrize("way", ["attribute", "from_pretrained"])
@pytest.mark.parametrize("field", sorted(INFORMATIONAL))
def test_an_informational_field_leaves_the_model_as_it_is(
    field: str, way: str, tmp_path: Path
) -> None:
    config = base_config("pre_ln")
    value, _ = INFORMATIONAL[field]
    assert equal(fingerprint(changed(way, config, field, value, tmp_path)), fingerprint(config))


@pytest.mark.parametrize(
    ("key", "value"),
    [("eps", 1e-3), ("scale", 0.5), ("cast", "input"), ("op", "layernorm")],
)
def test_an_edit_deep_in_the_residuals_breaks_the_seal(key: str, value: Any) -> None:
    config = base_config("pre_ln")
    config.residuals[2]["mlp"]["pre"][key] = value
    with pytest.raises(ValueError, match="no longer fit the resolved residuals"):
        LlmNormForCausalLM(config)


@pytest.mark.parametrize(
    "placement", [{"name": "mix_ln", "fraction": 0.5}, {"name": "normformer", "res_scale": True}]
)
def test_an_option_of_the_placement_cannot_be_edited_alone(placement: dict[str, Any]) -> None:
    config = build_config(SHAPE, placement=placement["name"])
    config.placement = placement
    with pytest.raises(ValueError, match="apply the placement again"):
        LlmNormForCausalLM(config)


def test_residuals_of_another_length_are_refused_with_both_numbers() -> None:
    config = base_config("pre_ln")
    config.num_hidden_layers = 6
    message = "residuals describes 4 layers but num_hidden_layers=6; apply the placement again"
    with pytest.raises(ValueError, match=message):
        config.residual_specs()


def test_an_edit_and_its_undoing_leave_the_seal_whole() -> None:
    config = base_config("deepnorm")
    config.hidden_size, kept = 48, config.hidden_size
    config.hidden_size = kept
    assert len(config.residual_specs()) == 4


# --- hand-made residuals ----------------------------------------------------------------------

HAND_MADE = {"placement": None, "norm": None, "final_norm": {"op": "rmsnorm"}}
PRE = {"attn": {"pre": {"op": "rmsnorm"}}, "mlp": {"pre": {"op": "rmsnorm"}}}


def hand_made(*layers: dict[str, Any], **other: Any) -> LlmNormConfig:
    given = {**SHAPE, **HAND_MADE, "num_hidden_layers": len(layers), **other}
    return LlmNormConfig(**given, residuals=list(layers))


def test_hand_made_residuals_stand_alone_without_a_placement(tmp_path: Path) -> None:
    config = hand_made(PRE, PRE, PRE, PRE)
    assert equal(fingerprint(config), fingerprint(build_config(SHAPE)))
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.placement is None
    assert equal(fingerprint(loaded), fingerprint(config))


def test_hand_made_residuals_may_be_edited_and_the_model_follows() -> None:
    other = {"attn": {"pre": {"op": "rmsnorm", "eps": 1e-2}}, "mlp": {"post": {"op": "dyt"}}}
    model = LlmNormForCausalLM(hand_made(PRE, other))
    assert model.model.layers[1].attn_residual.pre.eps == 1e-2
    assert type(model.model.layers[1].mlp_residual.post).__name__ == "DyT"
    assert LlmNormForCausalLM(hand_made(PRE, final_norm=None)).model.norm(1) == 1


@pytest.mark.parametrize("field", [{"norm": "rmsnorm"}, {"qk_norm": "per_head"}])
def test_hand_made_residuals_beside_a_norm_that_would_be_ignored_are_refused(
    field: dict[str, str],
) -> None:
    with pytest.raises(ValueError, match="norm must be null and qk_norm 'none'"):
        LlmNormForCausalLM(hand_made(PRE, **field))


def test_an_unknown_slot_or_norm_in_hand_made_residuals_is_refused() -> None:
    with pytest.raises(ValueError, match="no slot is called 'befor'"):
        LlmNormForCausalLM(hand_made({"attn": {"befor": {"op": "rmsnorm"}}, "mlp": {}}))
    with pytest.raises(ValueError, match="unknown norm 'rmsnrom'; did you mean 'rmsnorm'"):
        LlmNormForCausalLM(hand_made({"attn": {"pre": {"op": "rmsnrom"}}, "mlp": {}}))


@pytest.mark.parametrize(
    "layer",
    [
        {"attn": {}, "mlp": {"q": {"op": "rmsnorm"}}},
        {"attn": {}, "mlp": {"v": {"op": "rmsnorm"}}},
        {"attn": {"pre": {"op": "rmsnorm", "per_head": True}}, "mlp": {}},
        {"attn": {}, "mlp": {}, "mpl": {"pre": {"op": "rmsnorm"}}},
        {"attn": {}},
        {"attn": {"pre": None}, "mlp": {}},
    ],
    ids=["mlp-q", "mlp-v", "per_head-pre", "third-sublayer", "no-mlp", "null-slot"],
)
def test_hand_made_residuals_that_no_slot_would_hold_are_refused(layer: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"slot|layer|per_head|mlp"):
        LlmNormForCausalLM(hand_made(layer))


def test_neither_placement_nor_residuals_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="residuals"):
        LlmNormForCausalLM(LlmNormConfig(**SHAPE, placement=None, norm=None))


# --- shapes without residuals -----------------------------------------------------------------


def test_a_shape_without_residuals_is_pre_ln_with_rmsnorm() -> None:
    assert equal(fingerprint(LlmNormConfig(**SHAPE)), fingerprint(build_config(SHAPE)))


@pytest.mark.parametrize("norm", ["layernorm", {"op": "dyt", "alpha": {"attn": 0.7, "mlp": 0.3}}])
def test_a_shape_with_a_norm_and_qk_norm_is_pre_ln_with_them(norm: Any) -> None:
    bare = LlmNormConfig(**SHAPE, norm=norm, qk_norm="full_width", embedding="scale")
    built = build_config(SHAPE, norm=norm, qk_norm="full_width", embedding="scale")
    assert equal(fingerprint(bare), fingerprint(built))


@pytest.mark.parametrize("placement", ["post_ln", "peri_ln", {"name": "lns"}])
def test_another_placement_without_residuals_is_refused(placement: Any) -> None:
    config = LlmNormConfig(**SHAPE, placement=placement)
    with pytest.raises(ValueError, match="has no residuals; make the config with"):
        LlmNormForCausalLM(config)


@pytest.mark.parametrize("placement", ["pre_ln", "post_ln", "deepnorm"])
def test_residuals_cannot_be_dropped_from_a_resolved_config(placement: str) -> None:
    config = build_config(SHAPE, placement=placement)
    config.residuals = None
    with pytest.raises(ValueError, match="has no residuals"):
        LlmNormForCausalLM(config)


def test_an_unresolved_placement_has_no_options_that_are_ignored() -> None:
    config = LlmNormConfig(**SHAPE, placement={"name": "pre_ln", "alpha": 2.0})
    with pytest.raises(ValueError, match="alpha"):
        LlmNormForCausalLM(config)


def test_the_depth_of_a_folder_of_shapes_can_be_overridden(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llmnorm", **SHAPE}))
    config = AutoConfig.from_pretrained(tmp_path, num_hidden_layers=8)
    model = AutoModelForCausalLM.from_config(config)
    assert len(model.model.layers) == len(config.residual_specs()) == 8
    assert all(type(layer.mlp_residual.pre).__name__ == "RMSNorm" for layer in model.model.layers)


def test_an_override_of_a_folder_passes_through_construction_and_its_checks(tmp_path: Path) -> None:
    """What follows from a field is derived again, and what cannot be is refused while reading."""
    shape = {key: value for key, value in SHAPE.items() if key != "num_key_value_heads"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llmnorm", **shape}))
    config = AutoConfig.from_pretrained(tmp_path, num_attention_heads=8)
    assert (config.head_dim, config.num_key_value_heads) == (4, 8)
    with pytest.raises(ValueError, match="mlp is 'swiglu'; expected one of gated, plain"):
        AutoConfig.from_pretrained(tmp_path, mlp="swiglu")


# --- fields of Llama that mean something else here --------------------------------------------


def test_rms_norm_eps_is_refused_since_eps_belongs_to_the_norm(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set it in the norm: \{op: rmsnorm, eps"):
        LlmNormConfig(**SHAPE, rms_norm_eps=1e-5)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llmnorm", **SHAPE, "rms_norm_eps": 1e-5})
    )
    with pytest.raises(ValueError, match="rms_norm_eps is not read"):
        AutoConfig.from_pretrained(tmp_path)


def test_rms_norm_eps_as_an_override_of_a_folder_is_refused(tmp_path: Path) -> None:
    build_config(SHAPE).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="rms_norm_eps is not read"):
        AutoConfig.from_pretrained(tmp_path, rms_norm_eps=1e-5)


def test_rope_theta_reaches_the_rope_parameters() -> None:
    for config in (LlmNormConfig(**SHAPE, rope_theta=5e5), build_config(SHAPE, rope_theta=5e5)):
        assert config.rope_parameters["rope_theta"] == 5e5
    assert build_config(SHAPE).rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_rope_theta_as_an_override_of_a_folder_is_not_ignored(tmp_path: Path) -> None:
    build_config(SHAPE).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, rope_theta=5e5)
    assert config.rope_parameters["rope_theta"] == 5e5


def test_other_kinds_of_rope_are_refused() -> None:
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="rope_type is 'linear'; only 'default'"):
        LlmNormConfig(**SHAPE, rope_parameters=rope)


def test_a_partial_rotation_is_refused_since_it_would_be_ignored() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match="partial_rotary_factor"):
        build_config(SHAPE, rope_parameters=rope)


# --- shapes that cannot be --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vocab_size", 0, "vocab_size is 0; expected a whole number of at least 1"),
        ("num_hidden_layers", -1, "num_hidden_layers is -1"),
        ("num_key_value_heads", 3, "num_attention_heads=4 is not a multiple of"),
        ("head_dim", 7, "RoPE needs an even one"),
        ("initializer_range", 0.0, "initializer_range is 0.0; expected a number above 0"),
        ("mlp", "swiglu", "mlp is 'swiglu'; expected one of gated, plain"),
        ("position", "alibi", "position is 'alibi'; expected one of rope, learned, none"),
        ("hidden_act", "silo", "hidden_act is 'silo'; expected one of"),
        ("embedding", "scaled", "embedding is 'scaled'; expected one of raw, scale, norm"),
        ("embedding", {"treatment": "scale", "std": 1}, "embedding has no key 'std'"),
        ("embedding", {"treatment": "scale", "init": "one"}, "embedding.init is 'one'"),
        ("init", "xavier", "unknown init 'xavier'"),
    ],
)
def test_a_field_that_cannot_be_is_named_at_construction_and_when_edited_later(
    field: str, value: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LlmNormConfig(**{**SHAPE, field: value})
    config = LlmNormConfig(**SHAPE)
    try:
        setattr(config, field, value)
    except ValueError:
        return
    with pytest.raises(ValueError, match=message):
        LlmNormForCausalLM(config)


def test_an_odd_head_dim_is_allowed_without_rope() -> None:
    model = build_model(build_config(SHAPE, head_dim=7, position="none"))
    assert torch.isfinite(model(tokens()).logits).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_dropout", 2.0),
        ("attention_dropout", -0.1),
        ("attention_bias", "no"),
        ("tie_word_embeddings", "false"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": -1.0}),
        ("embedding", {"treatment": "raw", "norm": "rmsnorm"}),
        ("embedding", {"treatment": "norm", "init": "sqrt_dim"}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_value_that_cannot_be_meant_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        build_config(SHAPE, **{field: value})


# --- round trip -------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "placement"), FULL)
def test_every_scheme_survives_saving_and_loading(
    norm: str, placement: str, tmp_path: Path
) -> None:
    config = build_config(SHAPE, norm=norm, placement=placement)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    for field in fields(LlmNormConfig):
        if field.name != "transformers_version":
            assert getattr(loaded, field.name) == getattr(config, field.name), field.name
    assert loaded.residual_specs() == config.residual_specs()
    assert loaded.final_norm_spec() == config.final_norm_spec()
    assert loaded.seal() == config.wiring


def test_a_config_written_out_twice_is_the_same_text(tmp_path: Path) -> None:
    config = base_config("normformer")
    config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == text


# --- wrong kinds, and fields that would be ignored --------------------------------------------

BY_HAND: dict[str, Any] = {**SHAPE, "norm": None, "placement": None}
EMPTY: list[dict[str, Any]] = [{"attn": {}, "mlp": {}}] * SHAPE["num_hidden_layers"]
TWO: list[dict[str, Any]] = [{kind: {"module": "siamese"} for kind in ("attn", "mlp")}] * SHAPE[
    "num_hidden_layers"
]


def layers(attn: Any) -> list[dict[str, Any]]:
    return [{"attn": attn, "mlp": {}}] * SHAPE["num_hidden_layers"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"residuals": True}, "residuals is True; expected a list"),
        ({"residuals": [None] * 4}, "a layer of residuals is None; expected a mapping"),
        ({"residuals": [{"attn": {}, 1: {}}] * 4}, "has keys"),
        ({"residuals": layers("rmsnorm")}, "'rmsnorm'; expected a mapping"),
        ({"residuals": layers({None: 1, "x": 2})}, "no slot is called None"),
        ({"residuals": layers({"module": ["residual"]})}, "unknown residual module"),
        ({"residuals": TWO, "streams": True}, "streams is True; expected a mapping"),
        ({"residuals": EMPTY, "final_norm": {"op": "rmsnorm", "shared": True}}, "final_norm"),
        ({"residuals": EMPTY, "logits": {"op": "gain", "per_head": True}}, "logits cannot be"),
        ({"residuals": TWO, "streams": {"first": {"op": "gain", "shared": True}}}, "streams.first"),
    ],
)
def test_a_hand_made_wiring_of_a_wrong_kind_is_refused_in_one_line(
    given: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        LlmNormForCausalLM(LlmNormConfig(**BY_HAND, **given))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("streams", {"scale": 1.0}),
        ("logits", {"op": "gain"}),
        ("parametrization", "mup"),
        ("norm", {"op": "rmsnorm", "shared": True}),
        ("embedding", {"treatment": "norm", "norm": {"op": "rmsnorm", "per_head": True}}),
        ("qk_norm", {"layout": "full_width", "per_head": True}),
    ],
)
def test_a_shape_alone_refuses_what_only_resolved_residuals_can_hold(
    field: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=field):
        LlmNormForCausalLM(LlmNormConfig(**SHAPE, **{field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dtype", "one"),
        ("dtype", [1]),
        ("torch_dtype", "nn"),
        ("vocab_size", 10**40),
        ("rope_theta", 10**400),
        ("initializer_range", 10**400),
        ("attention_dropout", 10**400),
        ("eos_token_id", True),
        ("pad_token_id", [1]),
        ("rope_theta", 10**20),
        *((axis, {1: 2, "x": 3}) for axis in ("embedding", "init", "weights", "parametrization")),
        *((axis, {1: 2, "x": 3}) for axis in ("qk_norm", "rope_parameters")),
    ],
)
def test_a_value_of_a_wrong_kind_or_size_is_refused_by_its_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field.removeprefix("torch_") + "|plain has no option 1"):
        LlmNormForCausalLM(LlmNormConfig(**{**SHAPE, field: value}))
