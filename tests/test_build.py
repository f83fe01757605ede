"""From a shape, a norm and a placement to a model: every pair, the defaults, and every typo."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from schemes import FULL, NINE, PAIRS, POINTWISE, SHAPE, tokens

from llmnorm import (
    LlmNormForCausalLM,
    build_config,
    build_model,
    cite,
    list_norms,
    list_placements,
    register_norm,
)
from llmnorm.build import source_of
from llmnorm.errors import ConfigError
from llmnorm.modeling import operations
from llmnorm.modeling.operations import operation
from llmnorm.modeling.residual import NormSpec, ResidualSpec
from llmnorm.placements import PLACEMENTS, Placement, Site, parse_placement, register

pytestmark = pytest.mark.fast

# Placements that promise normalized branches or a normalized stream, which dyt and derf are not.
ASSUMES_A_NORM = (
    "post_ln",
    "res_post_ln",
    "peri_ln",
    "mix_ln",
    "deepnorm",
    "normformer",
    "sub_ln",
)


def test_all_nine_placements_and_four_norms_of_the_contract_are_there() -> None:
    assert set(list_norms()) >= {"layernorm", "rmsnorm", "dyt", "derf"}
    assert set(list_placements()) >= {*ASSUMES_A_NORM, "pre_ln", "lns"}
    assert len(PAIRS) >= 36


@pytest.mark.parametrize("placement", NINE)
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", *POINTWISE])
def test_a_doubtful_pair_logs_one_warning_and_no_other_pair_any(
    norm: str, placement: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="llmnorm"):
        build_config(SHAPE, norm=norm, placement=placement)
    doubtful = norm in POINTWISE and placement in ASSUMES_A_NORM
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(warnings) == doubtful
    if doubtful:
        assert norm in warnings[0].message
        assert placement in warnings[0].message


@pytest.mark.parametrize(
    ("scheme", "doubts"),
    [
        ({"norm": "dyt", "embedding": "raw"}, 1),
        ({"norm": "derf", "placement": "peri_ln", "embedding": "raw"}, 1),  # two doubts, one line
        ({"placement": "lns", "init": "scaled"}, 1),
        ({"placement": "lns", "init": "plain"}, 0),
        ({"norm": "dyt", "placement": {"name": "mix_ln", "fraction": 0.0}}, 0),
        ({"norm": "dyt", "qk_norm": "per_head"}, 0),
        ({"placement": "pre_ln", "init": "scaled"}, 0),
    ],
)
def test_options_that_undo_a_scheme_are_doubtful_too(
    scheme: dict[str, Any], doubts: int, caplog: pytest.LogCaptureFixture
) -> None:
    build_config(SHAPE, **scheme)
    assert len(caplog.records) == doubts


# --- embedding --------------------------------------------------------------------------------


@pytest.mark.parametrize("placement", NINE)
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", *POINTWISE])
def test_the_embedding_is_scaled_for_dyt_and_derf_normalized_for_peri_ln_and_raw_elsewhere(
    norm: str, placement: str
) -> None:
    config = build_config(SHAPE, norm=norm, placement=placement)
    wanted = "norm" if placement == "peri_ln" else "raw"
    wanted = "scale" if norm in POINTWISE else wanted
    assert config.embedding == wanted
    names = {name for name, _ in build_model(config).named_parameters()}
    assert ("model.embedding_scale.weight" in names) == (wanted == "scale")
    assert ("model.embedding_norm.weight" in names) == (wanted == "norm")


@pytest.mark.parametrize("treatment", ["raw", "scale", "norm"])
@pytest.mark.parametrize(("norm", "placement"), [("rmsnorm", "pre_ln"), ("dyt", "peri_ln")])
def test_the_embedding_treatment_can_be_chosen_for_any_scheme(
    norm: str, placement: str, treatment: str
) -> None:
    config = build_config(SHAPE, norm=norm, placement=placement, embedding=treatment)
    names = {name for name, _ in build_model(config).named_parameters()}
    assert ("model.embedding_scale.weight" in names) == (treatment == "scale")
    assert ("model.embedding_norm.weight" in names) == (treatment == "norm")


def test_the_norm_of_the_embedding_is_the_schemes_or_the_one_given() -> None:
    own = build_model(build_config(SHAPE, norm="layernorm", embedding="norm"))
    assert type(own.model.embedding_norm).__name__ == "LayerNorm"
    given = {"treatment": "norm", "norm": {"op": "rmsnorm", "eps": 1e-3}}
    other = build_model(build_config(SHAPE, norm="layernorm", embedding=given))
    assert type(other.model.embedding_norm).__name__ == "RMSNorm"
    assert other.model.embedding_norm.eps == 1e-3


def test_a_given_norm_of_the_embedding_takes_alpha_from_the_table() -> None:
    wide = {**SHAPE, "hidden_size": 2048, "num_hidden_layers": 1}
    config = build_config(wide, embedding={"treatment": "norm", "norm": "dyt"})
    assert config.embedding_spec().norm.options["alpha"] == 0.5


# --- norms on queries and keys ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("qk_norm", "query", "key", "kind"),
    [
        ("none", None, None, "Identity"),
        ("per_head", (8,), (8,), "RMSNorm"),
        ("full_width", (32,), (16,), "RMSNorm"),
        ({"layout": "per_head", "op": "layernorm", "bias": False}, (8,), (8,), "LayerNorm"),
        ({"layout": "full_width", "op": "dyt"}, (32,), (16,), "DyT"),
        ({"layout": "none"}, None, None, "Identity"),
    ],
)
@pytest.mark.parametrize("placement", ["pre_ln", "post_ln"])
def test_queries_and_keys_are_normalized_per_head_or_over_their_width(
    placement: str, qk_norm: Any, query: Any, key: Any, kind: str
) -> None:
    model = build_model(build_config(SHAPE, placement=placement, qk_norm=qk_norm))
    for layer in model.model.layers:
        attn = layer.self_attn
        assert type(attn.q_norm).__name__ == type(attn.k_norm).__name__ == kind
        assert type(attn.v_norm).__name__ == "Identity"
        shapes = [tuple(norm.weight.shape) for norm in (attn.q_norm, attn.k_norm) if query]
        assert shapes == ([query, key] if query else [])


@pytest.mark.parametrize("qk_norm", ["per_head", "full_width"])
@torch.no_grad()
def test_a_norm_on_queries_and_keys_frees_attention_of_their_scale(qk_norm: str) -> None:
    model = build_model(build_config(SHAPE, qk_norm=qk_norm)).double()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight *= 1e3  # above sqrt(eps)
        layer.self_attn.k_proj.weight *= 1e3
    before = model(tokens()).logits
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight *= 50
        if qk_norm == "per_head":  # each head has its own statistic
            layer.self_attn.q_proj.weight[:8] *= 7
    torch.testing.assert_close(model(tokens()).logits, before, rtol=1e-6, atol=1e-8)


def test_the_norm_on_queries_acts_before_rope() -> None:
    """A gain on one feature of a rotary pair does not commute with the rotation."""
    model = build_model(build_config(SHAPE, qk_norm="per_head", num_hidden_layers=1)).double()
    attn = model.model.layers[0].self_attn
    seen: dict[str, torch.Tensor] = {}
    attn.core.register_forward_pre_hook(lambda _m, args: seen.update(query=args[0]))
    with torch.no_grad():
        attn.q_norm.weight[0] = 0.0
    model(tokens())
    query = seen["query"]  # (batch, heads, seq, head_dim)
    assert (query[:, :, 0, 0] == 0).all()  # position 0 is not turned
    assert (query[:, :, 1:, 0] != 0).all()  # the pair (0, 4) is mixed after the norm


def heads_seen(model: LlmNormForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys (batch, heads, seq, head_dim) of the first layer, as they are compared."""
    seen: list[torch.Tensor] = []
    model.model.layers[0].self_attn.core.register_forward_pre_hook(
        lambda _m, args: seen.extend(args[:2])
    )
    model(tokens())
    return seen[0], seen[1]


def test_the_norm_on_queries_and_keys_can_act_after_rope() -> None:
    """Without a gain both orders are the same; a gain after RoPE multiplies the turned features."""
    layouts = {
        rope: {"layout": "per_head", "op": "rmsnorm", "rope": rope} for rope in ("before", "after")
    }
    before, after = (
        build_model(build_config(SHAPE, qk_norm=layout, num_hidden_layers=1)).double()
        for layout in layouts.values()
    )
    for one, two in zip(heads_seen(before), heads_seen(after), strict=True):
        torch.testing.assert_close(one, two)
    attn = after.model.layers[0].self_attn
    assert type(attn.q_norm) is type(attn.k_norm) is torch.nn.Identity
    plain = [part.clone() for part in heads_seen(after)]
    with torch.no_grad():
        attn.q_rotated.weight[0], attn.k_rotated.weight[0] = 0.0, 2.0
    query, key = heads_seen(after)
    assert (query[..., 0] == 0).all()  # at every position, unlike before RoPE
    torch.testing.assert_close(key[..., 0], 2 * plain[1][..., 0])
    torch.testing.assert_close(query[..., 1:], plain[0][..., 1:])


@pytest.mark.parametrize(("layout", "width"), [("per_head", 8), ("full_width", 16)])
def test_qkv_norm_normalizes_values_too(layout: str, width: int) -> None:
    chosen = {"layout": layout, "op": "rmsnorm", "value": True}
    model = build_model(build_config(SHAPE, qk_norm=chosen))
    attn = model.model.layers[2].self_attn
    assert type(attn.v_norm).__name__ == "RMSNorm"
    assert attn.v_norm.weight.shape == (width,)
    with torch.no_grad():
        attn.v_proj.weight *= 100
        wanted = model(tokens()).logits
        attn.v_proj.weight *= 100
    torch.testing.assert_close(model(tokens()).logits, wanted, rtol=1e-3, atol=1e-4)


def test_a_second_norm_on_queries_beside_the_placements_own_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"hybrid_norm fills slot . itself; set qk_norm"):
        build_config(SHAPE, placement="hybrid_norm", qk_norm="full_width")


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "rmsnrom"}, "unknown norm 'rmsnrom'; did you mean rmsnorm"),
        ({"norm": {"op": "layernrm"}}, "did you mean layernorm"),
        ({"norm": "LNS"}, "unknown norm 'LNS'; known: bhyt, crmsnorm, derf, dyt, fixnorm"),
        ({"norm": {"eps": 1e-6}}, "unknown norm None"),
        ({"norm": "constant"}, "unknown norm 'constant'"),
        ({"norm": {"op": "rmsnorm", "epsilon": 1e-6}}, "no option 'epsilon'; its options: eps"),
        ({"norm": {"op": "dyt", "alpha": {"attention": 1}}}, "alpha has no site 'attention'"),
        ({"placement": "pre-ln"}, "unknown placement 'pre-ln'; did you mean 'pre_ln'"),
        ({"placement": "LNS"}, "unknown placement 'LNS'"),
        ({"placement": {"fraction": 0.5}}, "unknown placement None"),
        ({"placement": {"name": "mix_ln", "ratio": 0.5}}, "mix_ln has no option 'ratio'"),
        ({"hiden_size": 64}, "no config field is called 'hiden_size'; did you mean hidden_size"),
        ({"residuals": []}, "residuals is set by the scheme; choose norm and placement"),
        ({"final_norm": None}, "final_norm is set by the scheme"),
        ({"qk_norm": "perhead"}, "qk_norm is 'perhead'; expected one of none, per_head"),
        ({"qk_norm": {"op": "rmsnorm"}}, "qk_norm has options"),
        ({"qk_norm": {"layout": "per_head", "op": "rmsnrom"}}, "did you mean 'rmsnorm'"),
        ({"qk_norm": {"layout": "per_head", "epsilon": 1}}, "no option 'epsilon'"),
        (
            {"qk_norm": {"layout": "full_width", "rope": "after"}},
            "qk_norm after RoPE is per head; its layout is 'full_width'",
        ),
        ({"qk_norm": {"layout": "per_head", "rope": "behind"}}, "qk_norm.rope is 'behind'"),
        ({"qk_norm": {"layout": "per_head", "value": 1}}, "qk_norm.value is 1; expected true"),
        ({"weights": "spectral"}, "weights is 'spectral'; expected one of plain, weight_norm"),
        ({"parametrization": "mupp"}, "parametrization is 'mupp'; expected standard or mup"),
        ({"logits": {"op": "gain"}}, "logits is set by the scheme"),
        ({"streams": {"scale": 1.0}}, "streams is set by the scheme"),
        ({"embedding": "scaled"}, "embedding is 'scaled'; expected one of raw, scale, norm"),
        ({"init": "xavier"}, "unknown init 'xavier'; known: plain"),
        ({"mlp": "swiglu"}, "mlp is 'swiglu'; expected one of gated, plain"),
        ({"position": "alibi"}, "position is 'alibi'"),
        ({"hidden_act": "swish2"}, "hidden_act is 'swish2'"),
        ({"rms_norm_eps": 1e-5}, "no config field is called 'rms_norm_eps'"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_anything_unknown_raises_a_config_error_of_one_line(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")) as caught:
        build_config(SHAPE, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": None}, "norm"),
        ({"norm": 3}, "norm"),
        ({"placement": None}, "placement"),
        ({"placement": 3}, "placement"),
        ({"placement": {"name": ["pre_ln"]}}, "placement"),
        ({"embedding": None}, "embedding"),
        ({"init": 3}, "init"),
        ({"init": {"embedding_std": "0.5"}}, "embedding_std"),
        ({"qk_norm": None}, "qk_norm"),
        ({"hidden_size": "32"}, "hidden_size"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_value_of_the_wrong_type_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(SHAPE, **arguments)


@pytest.mark.parametrize(
    "norm",
    [
        {"op": "rmsnorm", "eps": -1.0},
        {"op": "layernorm", "eps": "1e-6"},
        {"op": "dyt", "alpha": 0.0},
        {"op": "rmsnorm", "cast": "fp32"},
    ],
)
def test_an_impossible_value_of_a_norms_option_raises_before_there_is_a_model(
    norm: dict[str, Any],
) -> None:
    with pytest.raises(ConfigError, match=norm["op"]):
        build_model(build_config(SHAPE, norm=norm))


@pytest.mark.parametrize(
    "norm",
    [
        {"op": "rmsnorm", "eps": -1.0},
        {"op": "dyt", "alpha": 0.0},
        {"op": "rmsnorm", "cast": "fp32"},
        {"op": "rmsnorm", "scale": "2"},
        {"op": "derf", "shift": None},
        {"op": "rmsnorm", "per_head": True},
    ],
)
def test_an_impossible_value_of_a_norms_option_is_refused_with_the_config(
    norm: dict[str, Any],
) -> None:
    with pytest.raises(ConfigError, match=norm["op"]):
        build_config(SHAPE, norm=norm)


def test_a_scale_that_is_no_number_is_refused_before_there_is_a_model() -> None:
    with pytest.raises(ConfigError, match="scale"):
        build_model(build_config(SHAPE, norm={"op": "rmsnorm", "scale": "2"}))


def test_build_model_turns_a_parted_wiring_into_a_config_error() -> None:
    config = build_config(SHAPE)
    config.num_hidden_layers = 6
    with pytest.raises(ConfigError, match="residuals describes 4 layers but num_hidden_layers=6"):
        build_model(config)


# --- base -------------------------------------------------------------------------------------


def test_a_base_is_a_preset_a_folder_or_a_mapping(tmp_path: Path) -> None:
    by_name = build_config("debug", placement="lns")
    shape = {"model_type": "llmnorm", **SHAPE}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    by_folder = build_config(tmp_path, placement="lns")
    by_mapping = build_config(SHAPE, placement="lns")
    assert by_name.hidden_size == 128
    assert by_folder.residual_specs() == by_mapping.residual_specs()
    assert by_folder.vocab_size == SHAPE["vocab_size"]
    assert build_config(str(tmp_path)).hidden_size == 32


def test_the_folder_of_a_trained_model_gives_its_shape_and_nothing_of_its_scheme(
    tmp_path: Path,
) -> None:
    build_config(SHAPE, norm="derf", placement="deepnorm", qk_norm="per_head").save_pretrained(
        tmp_path
    )
    config = build_config(tmp_path)
    assert config.residual_specs() == build_config(SHAPE).residual_specs()
    assert (config.init, config.embedding, config.qk_norm) == ("plain", "raw", "none")


def test_an_unknown_or_foreign_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is named 'debgu'; did you mean debug"):
        build_config("debgu")
    with pytest.raises(ConfigError, match=r"this folder has no config.json"):
        build_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"expected a Hugging Face config.json"):
        build_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="model_type must be 'llmnorm'"):
        build_config(tmp_path)
    with pytest.raises(ConfigError, match="no config field is called 'width'"):
        build_config({"width": 32})
    with pytest.raises(ConfigError, match="norm is set by the scheme"):
        build_config({**SHAPE, "norm": "dyt"})


def test_overrides_win_over_the_base() -> None:
    config = build_config(SHAPE, vocab_size=101, num_hidden_layers=6, tie_word_embeddings=True)
    assert (config.vocab_size, len(config.residuals), config.tie_word_embeddings) == (101, 6, True)


@pytest.mark.parametrize(("field", "value"), [("init", "scaled"), ("embedding", "scale")])
def test_a_choice_in_the_base_mapping_is_kept(field: str, value: str) -> None:
    assert getattr(build_config({**SHAPE, field: value}), field) == value


def test_the_base_is_not_changed() -> None:
    base = dict(SHAPE)
    build_config(base, vocab_size=101)
    assert base == SHAPE


# --- registering, citing ----------------------------------------------------------------------


def test_a_placement_can_be_registered_once_and_is_built_at_once() -> None:
    with pytest.raises(ValueError, match="'pre_ln' is already registered by PreLN"):
        register("pre_ln", paper="0000.00000")(type("Other", (), {}))
    try:

        @register("mlp_only_ln", paper="0000.00000")
        @dataclass(frozen=True, kw_only=True)
        class MlpOnlyLN(Placement):
            """Pre-LN without a norm on what attention reads."""

            def residual(self, site: Site, norm: NormSpec) -> ResidualSpec:
                return ResidualSpec() if site.kind == "attn" else ResidualSpec(pre=norm)

        assert "mlp_only_ln" in list_placements()
        model = build_model(build_config(SHAPE, placement="mlp_only_ln"))
        assert type(model.model.layers[0].attn_residual.pre) is torch.nn.Identity
        assert isinstance(model, LlmNormForCausalLM)
    finally:
        PLACEMENTS.pop("mlp_only_ln")


@pytest.mark.parametrize(("norm", "placement"), FULL)
def test_cite_lists_the_papers_of_placement_and_norm(norm: str, placement: str) -> None:
    lines = cite(build_config(SHAPE, norm=norm, placement=placement)).splitlines()
    assert source_of(type(parse_placement(placement))) in lines
    assert norm == "none" or source_of(operation(norm)) in lines
    assert len(lines) == len(set(lines))
    assert all(line.strip() for line in lines)


@pytest.mark.parametrize(
    ("norm", "paper"),
    [
        ("rmsnorm", "1910.07467"),
        ("layernorm", "1607.06450"),
        ("dyt", "2503.10622"),
        ("derf", "2512.10938"),
    ],
)
def test_cite_names_the_paper_of_a_norm_beside_that_of_pre_ln(norm: str, paper: str) -> None:
    norms, placements = cite(build_config(SHAPE, norm=norm)).splitlines()[::-1]
    assert paper in norms
    assert "2002.04745" in placements


def test_cite_lists_what_queries_keys_and_embedding_stand_on_too() -> None:
    config = build_config(
        SHAPE,
        norm="dyt",
        placement="lns",
        qk_norm="per_head",
        embedding={"treatment": "norm", "norm": "layernorm"},
    )
    text = cite(config)
    for paper in ("2502.05795", "2503.10622", "1910.07467", "1607.06450"):
        assert paper in text


def test_every_key_of_a_folder_of_shapes_counts_or_is_refused(tmp_path: Path) -> None:
    shape = {**SHAPE, "rope_theta": 5e5, "qk_norm": "per_head", "init": "scaled"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llmnorm", **shape}))
    config = build_config(tmp_path)
    assert config.rope_parameters["rope_theta"] == 5e5
    assert (config.qk_norm, config.init) == ("per_head", "scaled")
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "num_hidden_layer": 9}))
    with pytest.raises(ConfigError, match=r"config\.json: no config field is called 'num_hidden"):
        build_config(tmp_path)


def test_a_folder_without_a_config_does_not_hide_a_preset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "debug").mkdir()
    monkeypatch.chdir(tmp_path)
    assert build_config("debug").hidden_size > 0


class GroupedRMS(torch.nn.Module):
    """A norm that keeps its width and must divide it: checked at the slot's real width."""

    def __init__(self, dim: int, *, groups: int = 4, scale: float = 1.0) -> None:
        super().__init__()
        if dim % groups:
            raise ValueError(f"{groups} groups do not divide {dim}")
        self.dim, self.groups, self.scale = dim, groups, scale
        self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, dim))

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.copy_(torch.linspace(0.5, 1.5, self.dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grouped = x.unflatten(-1, (self.groups, -1))
        rms = grouped.square().mean(-1, keepdim=True).sqrt() + 1e-6
        return self.scale * self.weight * (grouped / rms).flatten(-2)


def test_a_norm_that_knows_its_width_builds_and_passes_the_self_test() -> None:
    register_norm("grouped_rms")(GroupedRMS)
    try:
        build_model(build_config(SHAPE, norm="grouped_rms", placement="sub_ln"))
        with pytest.raises(ConfigError, match="5 groups do not divide 32"):
            build_config(SHAPE, norm={"op": "grouped_rms", "groups": 5})
    finally:
        operations.OPERATIONS.pop("grouped_rms")
        operations._NORMS.remove("grouped_rms")


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ({"norm": "none", "placement": "fixup", "weights": "project"}, "starts .* at 0"),
        ({"norm": "bhyt", "placement": "bhyt", "weights": "weight_norm"}, "keep weights plain"),
    ],
)
def test_weights_that_a_scheme_cannot_have_are_refused_with_the_config(
    scheme: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        build_config(SHAPE, **scheme)
