"""Every scheme, rewritten: the same logits, and fewer kinds of slots."""

import pytest
import torch
from schemes import FULL

from llmnorm.export import Form
from llmnorm.export.canonical import canonical
from llmnorm.export.folds import centre_stream, fold_biases, fold_gains, fold_pointwise
from llmnorm.export.form import Held, Sublayer
from llmnorm.export.simplify import simplify
from llmnorm.modeling.residual import NormSpec

EXACT = 1e-11  # of the logits' standard deviation, in float64
ROUGH = {"scalenorm": 1e-6}  # its eps of 1e-5 is of another kind


def far(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.std())


@pytest.mark.parametrize(("norm", "placement"), FULL)
def test_a_form_and_what_it_is_simplified_to_compute_what_the_model_does(
    norm, placement, moved, logits
):
    model = moved(placement, norm=norm)
    form, wanted = Form.of(model), logits(model)
    simple = simplify(form)
    assert far(logits(form), wanted) == 0
    assert far(logits(simple), wanted) < ROUGH.get(norm, EXACT)
    assert form.notes == []  # the original is left alone


@pytest.mark.parametrize(
    ("placement", "options"),
    [
        ("lns", {}),
        ("layerscale", {}),
        ("skip_init", {}),
        ("gpas", {}),
        ("completep", {}),
        ({"name": "gpas", "base": "lns"}, {}),
        ("pre_ln", {"parametrization": "mup", "qk_norm": "per_head"}),
        ("pre_ln", {"weights": "weight_norm"}),
        ("pre_ln", {"norm": "scalenorm", "embedding": "scale"}),
        ("pre_ln", {"norm": "l2norm", "tie_word_embeddings": True}),
        ("pre_ln", {"norm": {"op": "rmsnorm", "unit_offset": True, "cast": "input"}}),
        ("pre_ln", {"norm": {"op": "rmsnorm", "gain": "scalar"}, "embedding": "norm"}),
    ],
    ids=str,
)
def test_nothing_but_norms_is_left_of_pre_ln_and_its_kin(placement, options, moved, logits):
    model = moved(placement, **options)
    simple = simplify(Form.of(model))
    wanted = {"pre", "q", "k"} if "qk_norm" in options else {"pre"}
    assert {slot for sub in simple.sublayers() for slot in sub.spec.slots()} == wanted
    assert all(sub.get("pre").op == "rmsnorm" for sub in simple.sublayers())
    assert (simple.logits, simple.embedding.treatment) == (None, "raw")
    assert far(logits(simple), logits(model)) < 1e-8


def test_a_tied_table_is_untied_where_it_changes_and_the_cost_is_told(moved, logits):
    model = moved("pre_ln", tie_word_embeddings=True, embedding="scale")
    simple = simplify(Form.of(model))
    count = model.config.vocab_size * model.config.hidden_size
    assert not simple.tied
    assert len(simple.notes) == 1
    assert f"{count:,} parameters more" in simple.notes[0]
    kept = simplify(Form.of(moved("lns", tie_word_embeddings=True)))
    assert kept.tied
    assert kept.notes == []


def test_a_gain_of_the_stream_that_is_a_vector_stays_where_it_is(moved, logits):
    model = moved({"name": "normformer", "res_scale": True})
    simple = simplify(Form.of(model))
    assert {sub.get("skip").op for sub in simple.sublayers() if sub.kind == "mlp"} == {"gain"}
    assert far(logits(simple), logits(model)) < EXACT


def test_a_negative_gain_of_the_stream_turns_the_norms_that_read_it(moved, logits):
    model = moved("gpas")
    with torch.no_grad():
        model.model.layers[1].attn_residual.out.gate.fill_(3.0)  # 1 - silu(3) < 0
    assert far(logits(simplify(Form.of(model))), logits(model)) < EXACT


def test_a_layernorm_of_a_centred_stream_is_an_rmsnorm(moved, logits):
    model = moved("pre_ln", norm="layernorm", attention_bias=True, mlp_bias=True)
    form = simplify(Form.of(model))
    centre_stream(form)
    fold_biases(form)
    assert {form.get_final().op, *(sub.get("pre").op for sub in form.sublayers())} == {"rmsnorm"}
    assert all("bias" not in sub.get("pre").tensors for sub in form.sublayers())
    assert far(logits(form), logits(model)) < EXACT


def test_a_peri_layernorm_is_not_taken_for_one_of_a_centred_stream(moved, logits):
    form = simplify(Form.of(moved("peri_ln", norm="layernorm")))
    before = logits(form)
    centre_stream(form)
    assert form.get_final().op == "layernorm"
    assert torch.equal(logits(form), before)


def test_gains_go_into_the_matrices_that_read_them(moved, logits):
    model = moved("lns", tie_word_embeddings=True)
    form = simplify(Form.of(model))
    fold_gains(form)
    weights = [sub.get("pre").tensors["weight"] for sub in form.sublayers()]
    assert all(
        bool((weight == 1).all()) for weight in [*weights, form.parts("model.norm")["weight"]]
    )
    assert not form.tied
    assert far(logits(form), logits(model)) < EXACT


@pytest.mark.parametrize("norm", ["dyt", "derf", {"op": "pointwise", "function": "arctan"}])
def test_gain_and_bias_of_pointwise_norms_go_into_the_matrices(norm, moved, logits):
    model = moved("lns", norm=norm)
    form = simplify(Form.of(model))
    fold_pointwise(form)
    for sub in form.sublayers():
        held = sub.get("pre")
        assert bool((held.tensors["weight"] == 1).all())
        assert not held.tensors.get("bias", torch.zeros(1)).any()
        assert held.spec.options["scale"] == 1
    assert far(logits(form), logits(model)) < EXACT


@pytest.mark.parametrize(
    ("op", "options", "plain"),
    [
        ("gain", {}, "gain"),
        ("gpas", {"scale": 2.0}, "gain"),
        ("head_gain", {"heads": 4}, "gain"),
        ("none", {"scale": 3.0}, "gain"),
        ("fixnorm", {}, "rmsnorm"),
        ("simple_rmsnorm", {}, "rmsnorm"),
        ("rmsnorm", {"eps_placement": "outside", "eps": 1e-9}, "rmsnorm"),
        ("tapernorm", {}, "rmsnorm"),
        ("layernorm", {"elementwise_affine": False}, "layernorm"),
        ("dyt", {}, "dyt"),
        ("prmsnorm", {}, "prmsnorm"),
        ("scalar_bias", {}, "scalar_bias"),
    ],
)
@pytest.mark.fast
def test_an_operation_is_written_as_what_it_is(op, options, plain):
    spec = NormSpec(op=op, options=options)
    module = spec.build(8).double()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    held = Held(spec, dict(module.state_dict()))
    got = canonical(held, 8)
    x = torch.randn(5, 8, dtype=torch.float64)
    assert got.op == plain
    torch.testing.assert_close(got.module(8)(x), module.eval()(x), rtol=1e-7, atol=1e-12)


def test_a_copy_of_a_form_keeps_its_tensors_when_the_other_changes(moved):
    form = Form.of(moved("pre_ln"))
    name = Sublayer(form, 0, "attn").module_name("pre")
    kept, weight = form.copy(), form.tensors[f"{name}.weight"]
    Sublayer(form, 0, "attn").put("pre", None)
    assert form.parts(name) == {}
    assert f"{name}.weight" not in form.tensors
    assert list(kept.parts(name)) == ["weight"]
    kept.tensors[f"{name}.weight"] = weight * 2
    assert torch.equal(kept.parts(name)["weight"], weight * 2)
    assert form.parts(name) == {}


def test_a_tapered_norm_is_a_gain(moved):
    form = Form.of(moved("pre_ln", norm="tapernorm"))
    sub = Sublayer(form, 0, "attn")
    held = sub.get("pre")
    held.tensors["gate"] = torch.zeros(1, dtype=torch.float64)
    assert canonical(held, form.hidden).op == "gain"
    held.tensors["gate"] = torch.full((1,), 0.5, dtype=torch.float64)
    assert canonical(held, form.hidden).op == "tapernorm"
