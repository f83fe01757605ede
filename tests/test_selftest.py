"""Every promise that self_test checks, broken once: each must raise and name the module."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from schemes import SHAPE
from torch import nn

from llmnorm import LlmNormForCausalLM, build_config, build_model, self_test
from llmnorm.errors import SelfTestError
from llmnorm.modeling.gains import Constant, Gain
from llmnorm.modeling.norms import DyT, LayerNorm, RMSNorm
from llmnorm.modeling.residual import RESIDUALS, Residual

pytestmark = pytest.mark.fast

# Matrices of 64 x 192 elements and more: 10 % is 15 standard errors off.
WIDE = SHAPE | {"hidden_size": 64, "intermediate_size": 192, "num_key_value_heads": 4}


def fresh(placement: Any = "pre_ln", norm: Any = "rmsnorm", **overrides: Any) -> LlmNormForCausalLM:
    return build_model(build_config(WIDE, norm=norm, placement=placement, **overrides), seed=1)


def assert_broken(model: nn.Module, message: str, *, trained_too: bool) -> None:
    """Raises on a fresh model; on a trained one too where the promise survives training."""
    with pytest.raises(SelfTestError, match=message) as caught:
        self_test(model, fresh=True)
    assert "\n" not in str(caught.value)
    if trained_too:
        with pytest.raises(SelfTestError, match=message):
            self_test(model, fresh=False)
    else:
        self_test(model, fresh=False)


# --- nothing broken ---------------------------------------------------------------------------


class Engine(nn.Module):
    """A wrapper as engines make them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_a_wrapped_model_is_tested_inside() -> None:
    model = fresh("lns")
    self_test(Engine(Engine(model)), fresh=True)
    model.model.layers[1].attn_residual.pre.scale = 1.0
    with pytest.raises(SelfTestError, match=r"model\.layers\.1\.attn_residual\.pre\.scale"):
        self_test(Engine(Engine(model)), fresh=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_cast_as_a_whole_still_keeps_its_promises(dtype: torch.dtype) -> None:
    self_test(fresh("normformer", "derf").to(dtype), fresh=True)


# --- wiring -----------------------------------------------------------------------------------

PRE = "layers.2.mlp_residual.pre"


@pytest.mark.parametrize(
    ("placement", "name"),
    [
        ("pre_ln", "layers.0.attn_residual.pre"),
        ("pre_ln", "layers.3.mlp_residual.pre"),
        ("pre_ln", "norm"),
        ("post_ln", "layers.1.mlp_residual.out"),
        ("peri_ln", "layers.1.attn_residual.post"),
        ("peri_ln", "embedding_norm"),
        ("deepnorm", "layers.1.attn_residual.skip"),
        ("normformer", "layers.1.self_attn.inner"),
        ("normformer", "layers.1.mlp.inner"),
        ("sub_ln", "layers.1.self_attn.inner"),
        ("pre_ln", "layers.1.self_attn.q_norm"),
        ("pre_ln", "layers.1.self_attn.k_norm"),
    ],
)
def test_a_norm_replaced_by_identity_is_named(placement: str, name: str) -> None:
    """What a typo in the scheme's name does in public code: no norm, and no error."""
    model = fresh(placement, qk_norm="per_head")
    model.model.set_submodule(name, nn.Identity())
    assert_broken(model, rf"model\.{name} is Identity; the scheme promises", trained_too=True)


@pytest.mark.parametrize(
    ("placement", "name"),
    [
        ("pre_ln", "layers.0.attn_residual.post"),
        ("pre_ln", "layers.0.attn_residual.entry"),
        ("post_ln", "layers.1.mlp_residual.pre"),
        ("post_ln", "norm"),
        ("res_post_ln", "layers.1.mlp_residual.out"),
        ("pre_ln", "layers.1.self_attn.v_norm"),
        ("pre_ln", "layers.1.mlp.inner"),
        ("pre_ln", "embedding_norm"),
    ],
)
def test_an_extra_norm_is_named(placement: str, name: str) -> None:
    model = fresh(placement)
    model.model.set_submodule(name, RMSNorm(64))
    message = rf"model\.{name} is RMSNorm; the scheme promises Identity"
    assert_broken(model, message, trained_too=True)


def test_another_norm_or_gain_in_a_slot_is_named() -> None:
    model = fresh()
    model.model.set_submodule(PRE, LayerNorm(64))
    message = rf"model\.{PRE} is LayerNorm; the scheme promises RMSNorm"
    assert_broken(model, message, trained_too=True)
    model = fresh("deepnorm")
    model.model.set_submodule("layers.0.attn_residual.skip", Gain(64, value=8**0.25))
    assert_broken(model, r"attn_residual\.skip is Gain", trained_too=True)


def test_a_subclass_that_could_compute_anything_is_no_promised_norm() -> None:
    class Close(RMSNorm):
        """Another norm under a known one's parameters."""

    model = fresh()
    model.model.set_submodule(PRE, Close(64))
    assert_broken(model, rf"model\.{PRE} is Close; the scheme promises RMSNorm", trained_too=True)


@pytest.mark.parametrize("layers", [0, 3, 5])
def test_a_wrong_number_of_layers_raises(layers: int) -> None:
    model = fresh()
    blocks = [*model.model.layers, fresh().model.layers[0]]
    model.model.layers = nn.ModuleList(blocks[:layers])
    assert_broken(model, rf"the model has {layers} layers; 4 were promised", trained_too=True)


def test_lost_and_added_parameters_of_a_norm_are_named() -> None:
    model = fresh(norm="layernorm")
    model.model.layers[1].attn_residual.pre.bias = None
    message = r"model\.layers\.1\.attn_residual\.pre\.bias is missing or shared"
    assert_broken(model, message, trained_too=True)
    model = fresh(norm={"op": "layernorm", "bias": False})
    model.model.norm.bias = nn.Parameter(torch.zeros(64))
    assert_broken(model, r"model\.norm\.bias is a parameter; the config promises", trained_too=True)


def test_an_embedding_scale_lost_or_added_is_named() -> None:
    model = fresh(embedding="scale")
    model.model.embedding_scale = nn.Identity()
    message = r"model\.embedding_scale is Identity; embedding 'scale' promises EmbeddingScale"
    assert_broken(model, message, trained_too=True)
    model = fresh()
    model.model.embedding_scale = fresh(embedding="scale").model.embedding_scale
    assert_broken(model, "embedding 'raw' promises Identity", trained_too=True)


# --- constants --------------------------------------------------------------------------------


def test_a_lost_scale_of_lns_is_named_in_the_first_layer_that_lacks_it() -> None:
    """What a buffer wiped on the meta device, or Pre-LN under another name, looks like."""
    model = fresh("lns")
    for layer in model.model.layers:
        layer.attn_residual.pre.scale = layer.mlp_residual.pre.scale = 1.0
    message = r"model\.layers\.1\.attn_residual\.pre\.scale is 1\.0; the scheme promises 0\.7071"
    assert_broken(model, message, trained_too=True)


def test_an_lns_scale_that_counts_sublayers_or_from_zero_is_named() -> None:
    model = fresh("lns")
    model.model.layers[0].mlp_residual.pre.scale = 2**-0.5
    assert_broken(model, r"layers\.0\.mlp_residual\.pre\.scale is 0\.7071", trained_too=True)
    model = fresh("lns")
    model.model.norm.scale = 4**-0.5  # the final norm is not scaled
    assert_broken(model, r"model\.norm\.scale is 0\.5; the scheme promises 1\.0", trained_too=True)


@pytest.mark.parametrize("value", [2.8284, 8**-0.25, 1.0])  # fixed for 32 layers; inverted; lost
def test_a_wrong_constant_of_deepnorm_is_named(value: float) -> None:
    model = fresh("deepnorm")
    model.model.layers[3].mlp_residual.skip.value = value
    message = r"model\.layers\.3\.mlp_residual\.skip\.value is .*; the scheme promises 1\.68"
    assert_broken(model, message, trained_too=True)


@pytest.mark.parametrize(
    ("attribute", "value"), [("eps", 1e-5), ("cast", "input"), ("scale", 0.999)]
)
def test_a_changed_option_of_a_norm_is_named(attribute: str, value: Any) -> None:
    model = fresh()
    setattr(model.model.get_submodule(PRE), attribute, value)
    message = rf"model\.{PRE}\.{attribute} is {value!r}; the scheme promises"
    assert_broken(model, message, trained_too=True)


def test_a_constant_turned_into_a_buffer_is_named() -> None:
    model = fresh("lns")
    norm = model.model.layers[1].attn_residual.pre
    del norm.scale
    norm.register_buffer("scale", torch.tensor(2**-0.5))
    assert_broken(model, r"model\.layers\.1\.attn_residual\.pre\.scale", trained_too=True)


def test_an_unexpected_buffer_is_named() -> None:
    model = fresh()
    model.model.layers[2].register_buffer("running", torch.zeros(1), persistent=False)
    assert_broken(model, r"model\.layers\.2\.running is a buffer", trained_too=True)


def test_mixed_dtypes_are_named() -> None:
    model = fresh()
    model.model.layers[2].mlp.down_proj.bfloat16()
    message = r"parameters differ in dtype .*model\.layers\.2\.mlp\.down_proj\.weight is torch\.bf"
    assert_broken(model, message, trained_too=True)


# --- joints, shared slots, streams, logits ----------------------------------------------------


@pytest.mark.parametrize(("name", "placement"), [("attn", "pre_ln"), ("mlp", "deepnorm")])
def test_another_residual_module_is_named(name: str, placement: str) -> None:
    model = fresh(placement)
    model.model.get_submodule(f"layers.2.{name}_residual").__class__ = RESIDUALS["lerp"]
    message = rf"layers\.2\.{name}_residual is Lerp; the scheme promises residual"
    assert_broken(model, message, trained_too=True)


def test_a_scheme_of_its_own_residual_module_on_the_ordinary_one_is_named() -> None:
    model = fresh("ngpt", "l2norm")
    model.model.layers[1].mlp_residual.__class__ = Residual
    message = r"layers\.1\.mlp_residual is Residual; the scheme promises lerp"
    assert_broken(model, message, trained_too=True)


@pytest.mark.parametrize("word", ["reads", "skips"])
@pytest.mark.parametrize("placement", ["pre_ln", "parallel"])
def test_a_branch_that_reads_or_skips_elsewhere_is_named(placement: str, word: str) -> None:
    model = fresh(placement)
    joint = model.model.layers[3].mlp_residual
    setattr(joint, word, 1 - getattr(joint, word))
    message = r"layers\.3\.mlp_residual reads (stream|block) and skips (stream|block); the scheme"
    assert_broken(model, message, trained_too=True)


def test_a_shared_module_that_was_parted_is_named() -> None:
    model = fresh("parallel")
    layer = model.model.layers[1]
    layer.mlp_residual.pre = copy.deepcopy(layer.attn_residual.pre)
    message = r"layers\.1\.mlp_residual\.pre is not the module that attention's slot holds"
    assert_broken(model, message, trained_too=True)


def test_a_shared_module_of_another_layer_is_named() -> None:
    model = fresh("parallel")
    layers = model.model.layers
    layers[1].mlp_residual.pre = layers[2].mlp_residual.pre
    message = r"layers\.1\.mlp_residual\.pre is not the module that attention's slot holds"
    assert_broken(model, message, trained_too=True)


def test_a_lost_or_another_second_stream_is_named() -> None:
    model = fresh("residual_dual")
    model.model.streams.scale = 0.5
    assert_broken(model, r"model\.streams.*promises", trained_too=True)
    model = fresh("residual_dual")
    model.model.streams.second = nn.Identity()
    assert_broken(model, r"model\.streams\.second is Identity; the scheme", trained_too=True)
    model = fresh()
    model.model.streams = fresh("residual_dual").model.streams
    assert_broken(model, r"streams", trained_too=True)


def test_lost_or_other_logits_are_named() -> None:
    mup = {"name": "mup", "base_width": 32}
    model = fresh(parametrization=mup)
    assert model.logits.value == 0.5
    model.logits.value = 1.0
    message = r"logits\.value is 1\.0; the scheme promises 0\.5"
    assert_broken(model, message, trained_too=True)
    model.logits = nn.Identity()
    message = r"logits is Identity; the scheme promises Constant"
    assert_broken(model, message, trained_too=True)


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        ({"qk_norm": {"layout": "per_head", "rope": "after"}}, "self_attn.q_rotated"),
        ({"qk_norm": {"layout": "per_head", "rope": "after"}}, "self_attn.k_rotated"),
        ({"qk_norm": {"layout": "per_head", "value": True}}, "self_attn.v_norm"),
        ({"placement": "sdd"}, "mlp.up"),
        ({"placement": "sdd"}, "mlp.gate"),
        ({"placement": "skip_init"}, "mlp_residual.post"),
    ],
)
def test_a_lost_module_of_a_newer_slot_is_named(scheme: dict[str, Any], name: str) -> None:
    model = fresh(**scheme)
    model.model.layers[1].set_submodule(name, nn.Identity())
    message = rf"layers\.1\.{name} is Identity; the scheme promises"
    assert_broken(model, message, trained_too=True)


# --- initial values ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "name", "promised"),
    [
        ({"norm": "dyt"}, "layers.2.attn_residual.pre.alpha", "1"),
        ({"norm": {"op": "dyt", "alpha": 0.5}}, "norm.alpha", "0.5"),
        ({"norm": "derf"}, "layers.2.mlp_residual.pre.shift", "0"),
        ({"norm": "layernorm"}, "layers.0.mlp_residual.pre.bias", "0"),
        ({}, "layers.1.mlp_residual.pre.weight", "1"),
        ({"placement": "normformer"}, "layers.1.self_attn.inner.weight", "1"),
        ({"qk_norm": "per_head"}, "layers.1.self_attn.q_norm.weight", "1"),
    ],
)
def test_a_changed_initial_value_is_named_on_a_fresh_model_only(
    scheme: dict[str, Any], name: str, promised: str
) -> None:
    model = fresh(**scheme)
    with torch.no_grad():
        model.model.get_parameter(name)[-1] = 0.75  # one element
    message = rf"model\.{name} starts at 0\.75; the scheme promises {promised}$"
    assert_broken(model, message, trained_too=False)


def test_an_alpha_of_another_site_is_named() -> None:
    alpha = {"attn": 0.8, "mlp": 0.2, "final": 0.2}
    model = fresh(norm={"op": "dyt", "alpha": alpha})
    model.model.layers[1].mlp_residual.pre = DyT(64, alpha=0.8)
    message = r"mlp_residual\.pre\.alpha_init is 0\.8; the scheme promises 0\.2"
    assert_broken(model, message, trained_too=True)


def test_an_embedding_scale_of_sqrt_d_instead_of_1_over_std_is_named() -> None:
    model = fresh(norm="derf")
    with torch.no_grad():
        model.model.embedding_scale.weight.fill_(64**0.5)
    message = r"model\.embedding_scale\.weight starts at 8; the scheme promises 50"
    assert_broken(model, message, trained_too=False)


PROJECTIONS = [
    "model.layers.1.self_attn.q_proj",
    "model.layers.1.self_attn.k_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.1.self_attn.o_proj",
    "model.layers.1.mlp.gate_proj",
    "model.layers.1.mlp.up_proj",
    "model.layers.1.mlp.down_proj",
    "model.embed_tokens",
    "lm_head",
]


@pytest.mark.parametrize(
    ("placement", "name", "factor"),
    [
        *(("pre_ln", name, 0.9) for name in PROJECTIONS),
        *(("sub_ln", name, 1.1) for name in PROJECTIONS),
        *((placement, "lm_head", 0.0) for placement in ("pre_ln", "sub_ln")),
    ],
)
def test_a_std_off_by_a_tenth_is_named(placement: str, name: str, factor: float) -> None:
    model = fresh(placement)
    with torch.no_grad():
        model.get_submodule(name).weight *= factor
    message = rf"^{name}\.weight starts with std .*; the scheme's rule promises"
    assert_broken(model, message, trained_too=False)


def test_the_tolerance_is_five_standard_errors() -> None:
    model = fresh()
    weight = model.model.layers[1].mlp.up_proj.weight
    tolerance = 5 / math.sqrt(2 * weight.numel())
    with torch.no_grad():
        weight *= 0.02 / weight.double().std(unbiased=False).item()
        weight *= 1 + 0.98 * tolerance
    self_test(model, fresh=True)
    with torch.no_grad():
        weight *= (1 + 1.02 * tolerance) / (1 + 0.98 * tolerance)
    assert_broken(model, r"layers\.1\.mlp\.up_proj", trained_too=False)


def test_the_flipped_exponent_of_deepnorms_gain_is_named() -> None:
    """(8 L)^(+1/4) instead of (8 L)^(-1/4), as in two public repositories."""
    model = fresh("deepnorm")
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("v_proj", "o_proj"):
                getattr(layer.self_attn, name).weight *= 32**0.5
            for name in ("gate_proj", "up_proj", "down_proj"):
                getattr(layer.mlp, name).weight *= 32**0.5
    message = r"model\.layers\.0\.self_attn\.v_proj\.weight starts with std"
    assert_broken(model, message, trained_too=False)


def test_plain_init_where_the_scheme_promises_its_own_is_named() -> None:
    plain = fresh("deepnorm", init="plain").state_dict()
    model = fresh("deepnorm")
    model.load_state_dict(plain)
    assert_broken(model, r"layers\.0\.self_attn\.q_proj\.weight starts with", trained_too=False)


def test_the_std_of_a_scaled_embedding_and_of_an_untied_head_are_checked_apart() -> None:
    model = fresh(init={"policy": "plain", "embedding_std": 0.5})
    with torch.no_grad():
        model.model.embed_tokens.weight *= 0.02 / 0.5
    assert_broken(model, r"embed_tokens\.weight starts with std 0\.0", trained_too=False)
    tied = fresh(init={"policy": "plain", "embedding_std": 0.5}, tie_word_embeddings=True)
    self_test(tied, fresh=True)


@pytest.mark.parametrize("value", [0.1, float("nan")])
@pytest.mark.parametrize("name", ["self_attn.q_proj.bias", "mlp.down_proj.bias"])
def test_a_bias_that_does_not_start_at_zero_is_named(name: str, value: float) -> None:
    model = fresh(attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        model.model.layers[3].get_parameter(name)[5] = value
    message = rf"model\.layers\.3\.{name} starts at .*; the scheme promises 0$"
    assert_broken(model, message, trained_too=False)


def test_weights_that_are_not_finite_are_named() -> None:
    model = fresh()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    assert_broken(model, r"layers\.0\.mlp\.up_proj\.weight starts with std nan", trained_too=False)


# --- the meta device --------------------------------------------------------------------------


def on_meta(**scheme: Any) -> LlmNormForCausalLM:
    config = build_config(WIDE, **scheme)
    with torch.device("meta"):
        return LlmNormForCausalLM(config)


def test_a_model_left_on_the_meta_device_is_named() -> None:
    with pytest.raises(SelfTestError, match=r"embed_tokens\.weight was never initialized"):
        self_test(on_meta(), fresh=True)


def test_memory_that_was_never_filled_is_no_initialization() -> None:
    model = on_meta().to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # what fresh memory mostly holds
    with pytest.raises(SelfTestError, match="starts at 0; the scheme promises 1"):
        self_test(model, fresh=True)


@pytest.mark.parametrize("fresh_", [True, False])
def test_any_parameter_left_on_the_meta_device_is_named(fresh_: bool) -> None:
    model = fresh()
    with torch.device("meta"):
        model.model.layers[0].mlp.up_proj = nn.Linear(64, 192, bias=False)
    with pytest.raises(SelfTestError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        self_test(model, fresh=fresh_)


# --- promises of the config that are wiring too -----------------------------------------------


def untie(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def narrow(model: Any) -> None:
    model.model.layers[1].attn_residual.pre = RMSNorm(32)


def lose_bias(model: Any) -> None:
    model.model.layers[1].self_attn.q_proj.bias = None


def share(model: Any) -> None:
    model.model.layers[1].attn_residual.pre = model.model.layers[0].attn_residual.pre


@pytest.mark.parametrize(
    ("scheme", "break_it", "named"),
    [
        ({"tie_word_embeddings": True}, untie, "lm_head"),
        ({}, narrow, "attn_residual.pre"),
        ({"attention_bias": True}, lose_bias, "q_proj"),
        ({}, share, "attn_residual.pre"),
    ],
    ids=["untied", "narrow-norm", "lost-bias", "shared-norm"],
)
def test_a_broken_shape_or_tie_is_named(
    scheme: dict[str, Any], break_it: Callable[[Any], None], named: str
) -> None:
    model = fresh(**scheme)
    break_it(model)
    with pytest.raises(SelfTestError, match=named):
        self_test(model, fresh=True)


def test_the_constant_module_is_compared_by_value() -> None:
    model = fresh("deepnorm")
    model.model.layers[0].attn_residual.skip = Constant(64, value=8**0.25)
    self_test(model, fresh=True)
