"""Models in the classes of others: the same logits, and a sentence where a class holds none."""

from typing import Any

import pytest
import torch
from schemes import find_scheme
from transformers import PreTrainedModel

from llmnorm import list_placements
from llmnorm.config.problems import MAX_LINE
from llmnorm.errors import ConfigError
from llmnorm.export import Form
from llmnorm.export.canonical import gain
from llmnorm.export.fitting import Fit, explain, fit, holding
from llmnorm.export.folds import centre_stream
from llmnorm.export.form import EMBEDDING, HEAD
from llmnorm.export.hosts import HOSTS
from llmnorm.export.hosts.base import with_one_eps
from llmnorm.export.simplify import simplify

EXACT = 1e-9  # of the logits' standard deviation: the algebra, in float64
CLASS = 5e-6  # the same in a class that computes its norms and RoPE in float32

LN, LN_NO_BIAS = {"norm": "layernorm"}, {"norm": {"op": "layernorm", "bias": False}}
PLAIN = {**LN, "mlp": "plain", "hidden_act": "gelu_new"}
BIASED = {"attention_bias": True, "mlp_bias": True}
TIED, WIDE = {"tie_word_embeddings": True}, {"head_dim": 16}
LEARNED, QKV = {"position": "learned"}, {"attention_bias": True}
PER_HEAD, FULL = {"qk_norm": "per_head"}, {"qk_norm": "full_width"}
TWO_NORMS = {"name": "parallel", "shared_norm": False}

# host, placement, further arguments of the scheme and the shape.
ROWS: list[tuple[str, Any, dict[str, Any]]] = [
    ("llama", "pre_ln", {}),
    ("llama", "pre_ln", {**TIED, **WIDE, **BIASED}),
    ("llama", "lns", TIED),
    ("llama", "layerscale", {}),
    ("llama", "skip_init", {}),
    ("llama", "completep", {}),
    ("llama", "gpas", {"eps": False}),
    ("llama", "pre_ln", {"norm": "simple_rmsnorm"}),
    ("llama", "pre_ln", {"norm": {"op": "rmsnorm", "unit_offset": True}, "embedding": "scale"}),
    ("llama", "pre_ln", {"parametrization": "mup", **TIED}),
    ("llama", "pre_ln", LN_NO_BIAS),
    ("llama", "lns", {"norm": {"op": "layernorm", "bias": False}, **BIASED, **TIED}),
    ("llama", "pre_ln", {"embedding": "norm", **TIED}),
    ("llama", "pre_ln", {"norm": "none"}),
    ("mistral", "pre_ln", WIDE),
    ("qwen2", "pre_ln", TIED),
    ("granite", "pre_ln", {**TIED, **BIASED}),
    ("qwen3", "pre_ln", {**PER_HEAD, **WIDE, **TIED}),
    ("qwen3", "lns", {**PER_HEAD, **QKV}),
    ("qwen3", "pre_ln", {"qk_norm": {"layout": "per_head", "op": "l2norm", "gain": "scalar"}}),
    ("qwen3", "pre_ln", {"qk_norm": {"layout": "per_head", "elementwise_affine": False}}),
    ("olmo2", "res_post_ln", FULL),
    ("olmo2", "res_post_ln", {**FULL, **TIED, **QKV, "embedding": "scale"}),
    ("exaone4", "res_post_ln", {**PER_HEAD, **TIED}),
    ("glm4", "peri_ln", {**WIDE, "hidden_act": "gelu"}),
    ("glm4", "sandwich_ln", TIED),
    ("gemma2", "peri_ln", WIDE),
    ("gemma2", "sandwich_ln", {**TIED, **QKV}),
    ("gemma2", "sandwich_ln", {**TIED, "embedding": "scale"}),
    ("gemma3", "peri_ln", {**PER_HEAD, **WIDE, "hidden_act": "gelu_pytorch_tanh"}),
    ("gemma3", "sandwich_ln", {**PER_HEAD, **TIED}),
    ("stablelm", "pre_ln", {**LN, **TIED}),
    ("gpt_neox", "pre_ln", {**PLAIN, **BIASED}),
    ("nemotron", "pre_ln", {**PLAIN, **BIASED, **WIDE, "hidden_act": "relu2"}),
    ("olmo", "lns", LN_NO_BIAS),
    ("olmo", "pre_ln", {**LN_NO_BIAS, **TIED}),
    ("cohere", "parallel", LN_NO_BIAS),
    ("cohere", TWO_NORMS, {**LN_NO_BIAS, **TIED}),
    ("stablelm_parallel", "parallel", LN),
    ("gpt_neox_parallel", TWO_NORMS, PLAIN),
    ("phi", "parallel", {**PLAIN, **BIASED}),
    ("gpt2", "pre_ln", {**PLAIN, **BIASED, **LEARNED, **TIED}),
    ("gpt2", "lns", {**PLAIN, **LEARNED, "embedding": "scale", "num_key_value_heads": 4}),
    ("gpt2", "pre_ln", {**PLAIN, "position": "none"}),
    ("bitnet", "sub_ln", {**TIED}),
    ("minimax", "deepnorm", {"embedding": "norm", **WIDE}),
    ("minimax", "post_ln", {"embedding": "norm", **TIED}),
]


def far(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.std())


def hosted(fit: Fit) -> PreTrainedModel:
    """The class's own model in float64, its config read back as from a file."""
    made = type(config := fit.host.config(fit.form, torch.float64)).from_dict(config.to_dict())
    made._experts_implementation = "eager"
    model = fit.host.model_class(made).double().eval()
    found = model.load_state_dict(fit.host.write(fit.form, torch.float64), strict=False)
    assert found.unexpected_keys == []
    assert found.missing_keys == ([f"{HEAD}.weight"] if fit.form.tied else [])
    model.tie_weights()
    return model


@pytest.mark.parametrize(("name", "placement", "options"), ROWS, ids=lambda part: str(part))
def test_a_class_computes_what_the_model_does(name, placement, options, moved, logits):
    one_eps = options.get("eps", True)
    given = {key: value for key, value in options.items() if key != "eps"}
    model = moved(placement, depth=3, **given)
    wanted, found = logits(model), fit(Form.of(model), name)
    assert far(logits(found.form), wanted) < (EXACT if "l2norm" not in str(options) else CLASS)
    assert far(logits(hosted(found)), logits(with_one_eps(found.form))) < CLASS
    assert not one_eps or far(logits(hosted(found)), wanted) < CLASS


def test_every_class_is_in_a_row():
    assert {name for name, *_ in ROWS} == set(HOSTS)


def test_a_width_that_the_heads_do_not_divide_goes_where_a_config_allows_it(moved, logits):
    odd = {"hidden_size": 48, "num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 4}
    model = moved("pre_ln", depth=1, **odd)
    found = fit(Form.of(model), "auto")
    assert found.host.name == "mistral"  # Llama's config refuses it
    assert far(logits(hosted(found)), logits(model)) < CLASS
    with pytest.raises(ConfigError, match="wants a hidden_size that its 10 heads divide"):
        fit(Form.of(model), "llama")


# Which classes hold a placement with its usual norm; none: custom code.
HOLD = ["llama", "qwen2", "mistral", "granite"]
PERI = ["glm4", "gemma2"]
EXPECTED = {
    **dict.fromkeys(("completep", "depth_scaled", "gpas", "layerscale", "lns"), HOLD),
    **dict.fromkeys(("pre_ln", "skip_init"), HOLD),
    **dict.fromkeys(("peri_ln", "sandwich_ln"), PERI),
    "sub_ln": ["bitnet"],
}


@pytest.mark.parametrize("placement", list_placements())
def test_no_placement_gains_or_loses_a_class_unseen(placement, moved):
    form = Form.of(moved(placement, norm=find_scheme(placement).norm))
    assert holding(form) == EXPECTED.get(placement, [])


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", "dyt", "none", "tapernorm"])
def test_auto_takes_the_first_class_that_holds_the_model(norm, moved):
    found = fit(Form.of(moved("pre_ln", norm=norm)), "auto")
    first = {"rmsnorm": "llama", "none": "llama", "layernorm": "stablelm"}
    assert (None if found is None else found.host.name) == first.get(norm)


SAYS = [
    (
        *("glm4", "pre_ln", PER_HEAD),
        "--target glm4: Glm4ForCausalLM has no place for rmsnorm in slots q and k of attention; it "
        "needs a norm in slot post of attention and the mlp, where the model has none. It is made "
        "for rmsnorm with placement peri_ln or sandwich_ln. These hold the model as it is: qwen3.",
    ),
    (
        *("glm4", "peri_ln", PER_HEAD),
        "--target glm4: Glm4ForCausalLM has no place for rmsnorm in slots q and k of attention. It "
        "is made for rmsnorm with placement peri_ln or sandwich_ln, and would hold this model with "
        "qk_norm: none. These hold the model as it is: gemma3.",
    ),
    (
        *("minimax", "deepnorm", {}),
        "--target minimax: MiniMaxForCausalLM needs a norm of the embedding, which the model "
        "lacks. It is made for rmsnorm with placement post_ln or deepnorm, and embedding norm, and "
        "would hold this model with embedding: norm. No class holds the model as it is. Use "
        "--target custom.",
    ),
    (
        *("llama", "mix_ln", {}),
        "--target llama: LlamaForCausalLM has no place for rmsnorm in slot out of attention and "
        "the mlp (in 1 of 4 layers); it needs a norm in slot pre of attention and the mlp, where "
        "the model has none (in 1 of 4 layers). It is made for rmsnorm with placement pre_ln. No "
        "class holds the model as it is. Use --target custom.",
    ),
    (
        *("mistral", "pre_ln", BIASED),
        "--target mistral: MistralForCausalLM has no biases in q_proj, k_proj, v_proj, o_proj, "
        "gate_proj, up_proj and down_proj. It is made for rmsnorm with placement pre_ln, no "
        "biases. These hold the model as it is: llama, granite.",
    ),
]


@pytest.mark.parametrize(("target", "placement", "options", "text"), SAYS)
def test_a_refusal_is_a_sentence_that_says_what_to_do(target, placement, options, text, moved):
    with pytest.raises(ConfigError) as told:
        fit(Form.of(moved(placement, **options)), target)
    lines = str(told.value).splitlines()  # two, so that the command line cuts neither
    assert " ".join(lines) == text
    assert max(map(len, lines)) <= MAX_LINE


@pytest.mark.parametrize(
    ("placement", "options", "words"),
    [
        ("pre_ln", LN, "has no bias in the final norm, and no head can take it"),
        ("pre_ln", {"norm": "dyt"}, "has rmsnorm in slot pre of attention and the mlp, the model"),
        ("pre_ln", {"mlp": "plain"}, "has a gated mlp, the model a plain one"),
        ("pre_ln", LEARNED, "has position 'rope', the model 'learned'"),
        ("parallel", {}, "lets the mlp read the stream after attention, the model what attention"),
        ("span_norm", {}, "adds the mlp to the stream, the model to the block's input"),
        ("siamese_norm", {}, "has no joint siamese in attention and the mlp"),
        ("siamese_norm", {}, "has one residual stream, the model two"),
        ("ngpt", {"norm": "l2norm"}, "has no place for ngpt_query in slot q_rotated of attention"),
    ],
)
def test_what_stands_in_the_way_is_named(placement, options, words, moved):
    with pytest.raises(ConfigError) as told:
        fit(Form.of(moved(placement, **options)), "llama")
    assert words in str(told.value)


@pytest.mark.parametrize("target", ["llama", "gpt2", "gemma2"])
def test_a_norm_of_tokens_and_positions_together_fits_nowhere(target, moved):
    form = Form.of(moved("pre_ln", **{**PLAIN, **LEARNED, "embedding": "norm"}))
    with pytest.raises(ConfigError, match="nothing to the sum of tokens and positions, the model"):
        fit(form, target)


def test_llama_holds_layernorm_whose_final_bias_is_zero(moved, logits):
    model = moved("pre_ln", **LN, **TIED)
    with torch.no_grad():
        model.model.norm.bias.zero_()
    found = fit(Form.of(model), "auto")
    config = found.host.config(found.form, torch.float64)
    assert (found.host.name, config.attention_bias, config.mlp_bias) == ("llama", True, True)
    assert "untied the head" in found.form.notes[0]
    assert far(logits(hosted(found)), logits(model)) < CLASS


def test_a_stream_with_learned_positions_is_centred_in_both_tables(moved, logits):
    model = moved("pre_ln", **{**LN_NO_BIAS, **LEARNED})
    form = simplify(Form.of(model))
    centre_stream(form)
    assert form.get_final().op == "rmsnorm"
    assert far(logits(form), logits(model)) < EXACT


def test_heads_of_a_width_of_their_own_need_a_class_that_has_them(moved):
    with pytest.raises(ConfigError, match="heads of hidden_size / num_attention_heads = 8 feat"):
        fit(Form.of(moved("res_post_ln", **FULL, **WIDE)), "olmo2")


def test_an_unknown_target_is_told_the_known_ones(moved):
    with pytest.raises(ConfigError, match="--target bert: expected auto, custom or one of llama, "):
        fit(Form.of(moved("pre_ln")), "bert")


def test_where_no_class_holds_a_model_the_nearest_is_explained(moved):
    text = explain(Form.of(moved("res_post_ln")))
    assert text.startswith("No class holds this model; nearest is Olmo2ForCausalLM (olmo2), which ")
    assert text.endswith("and would hold this model with qk_norm: full_width.")


def test_minimax_takes_a_factor_of_the_skip_for_each_sublayer(moved, logits):
    model = moved("deepnorm", embedding="norm", depth=3)
    form = Form.of(model)
    for number, sub in enumerate(form.sublayers(), start=1):
        skip = torch.full((form.hidden,), 1 + 0.3 * number, dtype=torch.float64)
        sub.put("skip", gain(-skip if number == 4 else skip))
    found = fit(form, "minimax")
    assert far(logits(found.form), logits(form)) < EXACT
    assert far(logits(hosted(found)), logits(form)) < 3 * CLASS  # eps differ by alphas' squares


def test_minimax_has_no_factor_for_each_feature(moved):
    with pytest.raises(ConfigError, match="multiplies the skip by one number, the model each"):
        fit(Form.of(moved("admin", embedding="norm")), "minimax")


def without_norms(moved, *, centred: bool) -> Form:
    """A GPT-2 whose norms are gone; its matrices take the mean away, or not."""
    form = Form.of(moved("pre_ln", **{**PLAIN, **LEARNED, **BIASED, "norm": "none"}, depth=3))
    for name in [name for sub in form.sublayers() for name in sub.readers] + [HEAD]:
        weight = form.weight(name)
        form.tensors[f"{name}.weight"] = weight - centred * weight.mean(1, keepdim=True)
    return form


def test_gpt2_holds_a_model_whose_norms_became_matrices(moved, logits):
    form = without_norms(moved, centred=True)
    found = fit(form, "gpt2")
    assert "load in float32" in found.form.notes[-1]
    assert found.host.config(found.form, torch.float32).layer_norm_epsilon == 1e12
    assert far(logits(hosted(found)), logits(form)) < EXACT
    with pytest.raises(ConfigError, match="needs a norm in slot pre"):
        fit(without_norms(moved, centred=False), "gpt2")


def test_gemma_multiplies_the_table_by_the_root_that_its_dtype_can_hold(moved):
    form = Form.of(moved("sandwich_ln"))  # hidden size 32: sqrt is 5.65685
    found = fit(form, "gemma2")
    table = form.weight(EMBEDDING)
    for dtype, root in ((torch.bfloat16, 5.65625), (torch.float32, 5.6568541526794434)):
        written = found.host.write(found.form, dtype)[f"{EMBEDDING}.weight"]
        torch.testing.assert_close(written * root, table, rtol=1e-12, atol=0)


def test_a_class_says_when_its_servers_may_expect_another_activation(moved):
    notes = fit(Form.of(moved("peri_ln", **PER_HEAD)), "gemma3").form.notes
    assert "hidden_act is silu" in notes[-1]


def test_grouped_keys_and_values_are_repeated_for_a_class_without_groups(moved):
    found = fit(Form.of(moved("pre_ln", **PLAIN, **LEARNED)), "gpt2")
    assert found.form.shape["num_key_value_heads"] == 4
    assert "keys and values are written 2 times" in found.form.notes[-1]
