"""Conversions named equal are equal: a scheme's weights, folded, give another scheme's logits.

Each conversion is exact for any weights, so both models are computed in float64 from weights that
are moved off their start. Where a fold changes the length of what a norm reads, eps is made tiny,
for it is relative to that length. LNS, DeepNorm, Keel, ResiDual and depth scaling have theirs
beside their formulas.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from schemes import TOLERANCE, tokens
from torch.nn.functional import silu
from wiring import model_of

from llmnorm import LlmNormForCausalLM
from llmnorm.modeling.norms import RMSNorm

pytestmark = pytest.mark.fast

State = dict[str, torch.Tensor]
Fold = Callable[[State], None]

DEPTH, WIDTH, HEAD_DIM, HEADS = 4, 32, 8, 4
LAYERS = [f"model.layers.{index}." for index in range(DEPTH)]
READERS = {
    "attn": [f"self_attn.{part}_proj" for part in "qkv"],
    "mlp": ["mlp.gate_proj", "mlp.up_proj"],
}
WRITERS = {"attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}
# (layer, kind, name of the output projection), in the order of computation.
SUBLAYERS = [
    (layer, kind, f"{layer}{writer}.weight") for layer in LAYERS for kind, writer in WRITERS.items()
]
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TINY = {"op": "rmsnorm", "eps": 1e-30}


def ones(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.float64)


def norms_and_readers() -> dict[str, list[str]]:
    """Every norm of Pre-LN by its prefix, and the modules that read what it gives."""
    inside = {
        f"{layer}{kind}_residual.pre.": [f"{layer}{reader}" for reader in READERS[kind]]
        for layer, kind, _ in SUBLAYERS
    }
    return inside | {"model.norm.": ["lm_head"]}


# --- norms ------------------------------------------------------------------------------------


def scalenorm(state: State) -> None:
    """A length g is the gain g / sqrt(width)."""
    for name in [name for name in state if state[name].shape == (1,)]:
        state[name] = state[name] / WIDTH**0.5


def gains_of_one(state: State) -> None:
    for norm in norms_and_readers():
        state[f"{norm}weight"] = ones(WIDTH)


def unit_offset(state: State) -> None:
    """Gemma stores the gain minus 1."""
    for norm in norms_and_readers():
        state[f"{norm}weight"] = state[f"{norm}weight"] - 1


# --- queries and keys -------------------------------------------------------------------------


def qknorm(slot: str) -> Fold:
    """The scores are g cos(q, k), g both scalar gains / sqrt(head_dim); as RMSNorm over each head
    that is the gain sqrt(g / sqrt(head_dim)) on every feature of queries and keys.
    """

    def fold(state: State) -> None:
        for layer in LAYERS:
            names = [f"{layer}self_attn.{part}_{slot}.weight" for part in "qk"]
            g = state[names[0]] * state[names[1]] / HEAD_DIM**0.5
            for name in names:
                state[name] = torch.sqrt(g / HEAD_DIM**0.5).expand(HEAD_DIM)

    return fold


# --- branches ---------------------------------------------------------------------------------


def branch_gains(state: State) -> None:
    """What multiplies a branch multiplies the rows of its output projection."""
    for layer, kind, writer in SUBLAYERS:
        gain = state.pop(f"{layer}{kind}_residual.post.weight")
        state[writer] = gain[:, None] * state[writer]


def shared_branch_gain(state: State) -> None:
    """As `branch_gains`, where the mlp's number is attention's."""
    for layer in LAYERS:
        state[f"{layer}mlp_residual.post.weight"] = state[f"{layer}attn_residual.post.weight"]
    branch_gains(state)


def completep(state: State) -> None:
    """m_L = 4 / 2 divides branches, m_d = 32 / 16 logits, head_dim scores in place of its root."""
    for layer, kind, writer in SUBLAYERS:
        state[writer] = state[writer] / 2
        if kind == "attn":
            query = f"{layer}self_attn.q_proj.weight"
            state[query] = state[query] / HEAD_DIM**0.5
    state[HEAD] = state[HEAD] / 2


def head_gains(state: State) -> None:
    """HeadScale multiplies the columns that a head feeds into the output projection."""
    for layer in LAYERS:
        gain, writer = state[f"{layer}self_attn.inner.weight"], f"{layer}self_attn.o_proj.weight"
        state[writer] = state[writer] * gain.repeat_interleave(HEAD_DIM)
        state[f"{layer}self_attn.inner.weight"] = ones(HEADS)


def longer_branches(state: State) -> None:
    """A norm after a branch takes away any factor on its output projection."""
    for _, _, writer in SUBLAYERS:
        state[writer] = 7 * state[writer]


def skips_of_alpha(state: State) -> None:
    for layer, kind, _ in SUBLAYERS:
        state[f"{layer}{kind}_residual.skip.weight"] = (2 * DEPTH) ** 0.25 * ones(WIDTH)


def one_norm_twice(state: State) -> None:
    for layer in LAYERS:
        state[f"{layer}mlp_residual.pre.weight"] = state[f"{layer}attn_residual.pre.weight"]


# --- embedding and matrices -------------------------------------------------------------------


def normalized_rows(state: State) -> None:
    """Without absolute positions the norm of an embedding is one of each row of the table."""
    norm = RMSNorm(WIDTH).double()
    norm.load_state_dict({"weight": state.pop("model.embedding_norm.weight")})
    state[TABLE] = norm(state[TABLE]).detach()


def rows_of_length_sqrt_dim(state: State) -> None:
    state[TABLE] = WIDTH**0.5 * state[TABLE] / state[TABLE].norm(dim=1, keepdim=True)


def scaled_rows(state: State) -> None:
    state[TABLE] = state.pop("model.embedding_scale.weight") * state[TABLE]


def written_out(state: State) -> None:
    """W = length V / |V|, row by row."""
    for name in [name for name in state if name.endswith(".length")]:
        matrix = name.replace(".length", ".weight")
        lengths = state.pop(name) / state[matrix].norm(dim=1)
        state[matrix] = lengths[:, None] * state[matrix]


PRE: dict[str, Any] = {"placement": "pre_ln"}
PERI: dict[str, Any] = {"placement": "peri_ln"}
COSINE = {"layout": "per_head", "op": "l2norm", "gain": "scalar", "weight_init": 5.0}
PER_HEAD = {"layout": "per_head", **TINY}
COMPLETEP = {"name": "completep", "base_width": 16, "base_depth": 2}
FIXNORM = {"treatment": "norm", "norm": "fixnorm"}

# A scheme, the scheme that it is, and what happens to the weights.
CONVERSIONS: dict[str, tuple[dict[str, Any], dict[str, Any], Fold]] = {
    "scalenorm": (
        PERI | {"norm": "scalenorm"},
        PERI | {"norm": TINY | {"gain": "scalar"}},
        scalenorm,
    ),
    "simple_rmsnorm": (PRE | {"norm": "simple_rmsnorm"}, PRE, gains_of_one),
    "unit_offset": (PRE, PRE | {"norm": {"op": "rmsnorm", "unit_offset": True}}, unit_offset),
    "qknorm": (PRE | {"qk_norm": COSINE}, PRE | {"qk_norm": PER_HEAD}, qknorm("norm")),
    "qknorm after rope": (
        PRE | {"qk_norm": COSINE | {"rope": "after"}},
        PRE | {"qk_norm": PER_HEAD | {"rope": "after"}},
        qknorm("rotated"),
    ),
    "layerscale": ({"placement": "layerscale"}, PRE, branch_gains),
    "skip_init": ({"placement": "skip_init"}, PRE, branch_gains),
    "rezero without any norm": (
        {"placement": "rezero", "norm": "none"},
        PRE | {"norm": "none"},
        shared_branch_gain,
    ),
    "completep": ({"placement": COMPLETEP}, PRE, completep),
    "head gains": ({"placement": "normformer"}, {"placement": "normformer"}, head_gains),
    "length of branches": (PERI | {"norm": TINY}, PERI | {"norm": TINY}, longer_branches),
    "deepnorm": ({"placement": "deepnorm"}, {"placement": "admin"}, skips_of_alpha),
    "one norm for both": (
        {"placement": "parallel"},
        {"placement": {"name": "parallel", "shared_norm": False}},
        one_norm_twice,
    ),
    "embedding norm": (PERI, {"placement": "sandwich_ln"}, normalized_rows),
    "embedding fixnorm": (PRE | {"embedding": FIXNORM}, PRE, rows_of_length_sqrt_dim),
    "embedding scale": (PRE | {"embedding": "scale"}, PRE, scaled_rows),
    "weight_norm": (PRE | {"weights": "weight_norm"}, PRE, written_out),
}


def state_of(model: LlmNormForCausalLM) -> State:
    return {name: value.clone() for name, value in model.state_dict().items()}


@torch.no_grad()
def assert_becomes(source: LlmNormForCausalLM, target: LlmNormForCausalLM, state: State) -> None:
    """`target` with `state` has the logits of `source`."""
    target.load_state_dict(state)
    wanted = source(tokens()).logits
    torch.testing.assert_close(target(tokens()).logits, wanted, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_scheme_whose_weights_are_folded_is_the_other_scheme(name: str) -> None:
    source_scheme, target_scheme, fold = CONVERSIONS[name]
    source, target = model_of(**source_scheme), model_of(**target_scheme)
    state = state_of(source)
    fold(state)
    assert_becomes(source, target, state)


def test_unit_queries_and_keys_are_compared_by_their_cosine_times_g() -> None:
    """Gains that start at sqrt(g sqrt(head_dim)) start g, QKNorm's factor, at any number."""
    g = 16.0
    weight_init = (g * HEAD_DIM**0.5) ** 0.5
    model = model_of("pre_ln", depth=1, qk_norm=COSINE | {"weight_init": weight_init})
    attention, seen = model.model.layers[0].self_attn, []
    for norm in (attention.q_norm, attention.k_norm):
        norm.reset_parameters()
    attention.core.register_forward_pre_hook(lambda _, given: seen.extend(given[:2]))
    model(tokens())
    query, key = seen[0], seen[1].repeat_interleave(2, dim=1)  # (batch, heads, seq, head_dim)
    scores = (query[:, :, :, None] * key[:, :, None]).sum(-1) * attention.core.scaling
    cosines = torch.cosine_similarity(query[:, :, :, None], key[:, :, None], dim=-1)
    torch.testing.assert_close(scores, g * cosines, **TOLERANCE[torch.float64])


# --- GPAS -------------------------------------------------------------------------------------


def gates_folded(state: State) -> None:
    """The stream is C times that of Pre-LN: branches are divided by the C before them, and a norm,
    which keeps the sign of what it reads alone, has a gain of the sign of C.
    """
    total = ones(1)
    for layer in LAYERS:
        factor = 1 - silu(state.pop(f"{layer}attn_residual.out.gate"))
        for kind, writer in WRITERS.items():
            gain = f"{layer}{kind}_residual.pre.weight"
            state[gain] = total.sign() * state[gain]
            state[f"{layer}{writer}.weight"] = state[f"{layer}{writer}.weight"] / total
            total = total * factor
    state["model.norm.weight"] = total.sign() * state["model.norm.weight"]


def gated() -> LlmNormForCausalLM:
    """GPAS over Pre-LN, the sublayers of its second layer each turning the stream around."""
    model = model_of("gpas", norm=TINY)
    for layer, gate in zip(model.model.layers, (0.4, 1.7, -0.6, 0.2), strict=True):
        layer.attn_residual.out.gate.data.fill_(gate)
    return model


def test_gates_of_gpas_fold_into_output_projections_and_the_signs_of_gains() -> None:
    source, target = gated(), model_of("pre_ln", norm=TINY)
    state = state_of(source)
    gates_folded(state)
    assert_becomes(source, target, state)


def test_the_fold_of_gpas_keeps_the_value_and_not_the_gradient() -> None:
    """Its gradient passes the gates unchanged, so a folded model would train otherwise."""
    source, target = gated(), model_of("pre_ln", norm=TINY)
    state = state_of(source)
    gates_folded(state)
    target.load_state_dict(state)
    slopes = []
    for model in (source, target):
        model(tokens(), labels=tokens()).loss.backward()
        slopes.append(model.model.embed_tokens.weight.grad)
    assert not torch.allclose(*slopes, rtol=0.1)


# --- TaperNorm, HybridNorm*, Keel -------------------------------------------------------------


def test_a_tapered_model_is_one_without_any_norm() -> None:
    """With closed gates each norm is a gain c w', which the columns of its readers take."""
    source = model_of("pre_ln", norm={"op": "tapernorm", "final": "taper"})
    target = model_of("pre_ln", norm="none")
    for name, parameter in source.named_parameters():
        if name.endswith(".gate"):
            parameter.data.zero_()
    state = state_of(source)
    for norm, readers in norms_and_readers().items():
        gain = state[f"{norm}c"] * state[f"{norm}taper_weight"]
        for reader in readers:
            state[f"{reader}.weight"] = state[f"{reader}.weight"] * gain
    without = {name: value for name, value in state.items() if name in target.state_dict()}
    assert_becomes(source, target, without)


def test_the_first_layer_of_hybrid_norm_star_is_pre_ln_with_qkv_norm() -> None:
    source = model_of("hybrid_norm_star", depth=1)
    target = model_of(
        "pre_ln", depth=1, qk_norm={"layout": "per_head", "op": "rmsnorm", "value": True}
    )
    assert_becomes(source, target, state_of(source))


def test_keels_inner_norm_is_linear_after_an_outer_norm_of_scalar_gain() -> None:
    """What it reads has RMS g, so it multiplies by its gain / g; an outer vector gain does not."""
    x = torch.randn(5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inner = RMSNorm(WIDTH, eps=1e-30).double()
    scalar = RMSNorm(WIDTH, eps=1e-30, gain="scalar", weight_init=1.7).double()
    vector = RMSNorm(WIDTH, eps=1e-30).double()
    inner.weight.data.copy_(torch.linspace(0.5, 2, WIDTH))
    vector.weight.data.copy_(torch.linspace(0.5, 2, WIDTH).flip(0))
    torch.testing.assert_close(inner(scalar(x)), scalar(x) * inner.weight / 1.7)
    ratios = inner(vector(x)) / (vector(x) * inner.weight)
    assert ratios.amax() / ratios.amin() > 1.1


# --- Pre-LN, Pre-RMSNorm, Pre-CRMSNorm --------------------------------------------------------

BIASES = {"attention_bias": True, "mlp_bias": True}


def layernorm_folded(state: State) -> None:
    """W <- W diag(gain), b <- b + W bias for all that a norm feeds; the head has no bias."""
    for norm, readers in norms_and_readers().items():
        gain, shift = state.pop(f"{norm}weight"), state.pop(f"{norm}bias")
        for reader in readers:
            weight = state[f"{reader}.weight"]
            if reader != "lm_head":
                state[f"{reader}.bias"] = state[f"{reader}.bias"] + weight @ shift
            state[f"{reader}.weight"] = weight * gain


def centred(state: State) -> None:
    """All that writes to the stream has zero mean over its features: so has the stream."""
    state[TABLE] = state[TABLE] - state[TABLE].mean(1, keepdim=True)
    for _, _, writer in SUBLAYERS:
        bias = writer.replace("weight", "bias")
        state[writer] = state[writer] - state[writer].mean(0, keepdim=True)
        state[bias] = state[bias] - state[bias].mean()


def compressed(state: State) -> None:
    """The last feature is minus the sum of the others: it is not stored."""
    for readers in norms_and_readers().values():
        for reader in readers:
            weight = state[f"{reader}.weight"]
            state[f"{reader}.weight"] = weight[:, :-1] - weight[:, -1:]
    state[TABLE] = state[TABLE][:, :-1]
    for _, _, writer in SUBLAYERS:
        for name in (writer, writer.replace("weight", "bias")):
            state[name] = state[name][:-1]


def pre_ln_with_biases() -> LlmNormForCausalLM:
    model = model_of("pre_ln", norm="layernorm", **BIASES)
    model.model.norm.bias.data.zero_()
    return model


def test_pre_ln_is_pre_rmsnorm_once_gains_are_folded_and_writers_centred() -> None:
    source = pre_ln_with_biases()
    target = model_of("pre_ln", norm={"op": "rmsnorm", "elementwise_affine": False}, **BIASES)
    state = state_of(source)
    layernorm_folded(state)
    target.load_state_dict(state)
    with torch.no_grad():
        assert not torch.allclose(target(tokens()).logits, source(tokens()).logits, rtol=1e-2)
    centred(state)
    assert_becomes(source, target, state)


def test_pre_ln_is_pre_crmsnorm_of_a_stream_one_feature_narrower() -> None:
    source = pre_ln_with_biases()
    narrow = {"hidden_size": WIDTH - 1, "head_dim": HEAD_DIM}
    target = model_of("pre_ln", norm="crmsnorm", **narrow, **BIASES)
    state = state_of(source)
    for fold in (layernorm_folded, centred, compressed):
        fold(state)
    assert_becomes(source, target, state)
