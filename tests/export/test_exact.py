"""LayerNorm becomes RMSNorm and CRMSNorm without a change of output, or one line says why not."""

import json
from pathlib import Path

import pytest
import torch
from saved import save
from torch.nn.functional import layer_norm

from llmnorm.cli import run_command
from llmnorm.errors import ConfigError, LlmNormError, ParityError
from llmnorm.evaluation.loading import load
from llmnorm.export import Form, convert, exact
from llmnorm.export.exact import layernorm_to_rmsnorm, named, rmsnorm_to_crmsnorm

EXACT = 1e-12  # of the logits' standard deviation, in float64
BARE = {"op": "layernorm", "bias": False}
BIASED = {"attention_bias": True, "mlp_bias": True}
ROTATED = {"layout": "per_head", "op": "rmsnorm", "eps": 1e-5, "rope": "after", "value": True}


def far(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.std())


def run(*words: object) -> int:
    return run_command(convert, "llmnorm convert", [str(word) for word in words])


@pytest.mark.parametrize("conversion", [layernorm_to_rmsnorm, rmsnorm_to_crmsnorm])
@pytest.mark.parametrize(
    ("placement", "options"),
    [
        ("pre_ln", {}),
        ("pre_ln", {**BIASED, "tie_word_embeddings": True, "head_dim": 16}),
        ("pre_ln", {"qk_norm": "per_head", "embedding": "scale"}),
        ("pre_ln", {"qk_norm": ROTATED}),
        ("pre_ln", {"qk_norm": "full_width", "mlp": "plain", "hidden_act": "gelu"}),
        ("pre_ln", {"position": "learned", "mlp": "plain"}),
        ("lns", {}),
        ("layerscale", {}),
        ("skip_init", {}),
    ],
    ids=str,
)
def test_a_pre_ln_model_of_layernorms_is_one_of_pre_ln_and_the_other_norm(
    conversion, placement, options, moved, logits
):
    model = moved(placement, norm=BARE, **options)
    form = conversion(Form.of(model))
    config = named(form)
    assert config is not None
    assert config.placement == {"name": "pre_ln"}
    narrower = conversion is rmsnorm_to_crmsnorm
    assert config.norm["op"] == ("crmsnorm" if narrower else "rmsnorm")
    assert config.hidden_size == model.config.hidden_size - narrower
    assert config.head_dim == model.config.head_dim
    assert not config.tie_word_embeddings
    assert far(logits(form.to_model(config)), logits(model)) < EXACT


def test_biases_of_norms_become_biases_of_the_layers_after_them(moved, logits):
    model = moved("pre_ln", norm="layernorm")
    with torch.no_grad():
        model.model.norm.bias.zero_()
    for conversion in (layernorm_to_rmsnorm, rmsnorm_to_crmsnorm):
        config = named(conversion(Form.of(model)))
        assert (config.attention_bias, config.mlp_bias) == (True, True)
        assert not config.norm.get("bias")
        form = conversion(Form.of(model))
        assert far(logits(form.to_model(config)), logits(model)) < EXACT


def test_a_bias_before_the_head_keeps_all_biases_in_the_norms(moved, logits):
    model = moved("pre_ln", norm="layernorm")
    form = layernorm_to_rmsnorm(Form.of(model))
    config = named(form)
    assert config.norm["bias"]
    assert not config.attention_bias
    assert "no head takes" in form.notes[-1]
    assert far(logits(form.to_model(config)), logits(model)) < EXACT
    with pytest.raises(ConfigError, match="no head can take and crmsnorm has none"):
        rmsnorm_to_crmsnorm(Form.of(model))


def test_the_converted_stream_is_the_layernorms_stream_without_its_mean(moved):
    """Written out: centred rows and columns, LayerNorm(x) = RMSNorm(x - mean(x))."""
    model = moved("pre_ln", norm=BARE)
    form = layernorm_to_rmsnorm(Form.of(model))
    rms, crms = form.to_model(), rmsnorm_to_crmsnorm(form).to_model()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        states = [m.model(ids, output_hidden_states=True).hidden_states for m in (model, rms, crms)]
        for wide, centred, narrow in zip(*states, strict=True):
            if wide is states[0][-1]:
                break  # the last is normalized already
            mean = wide.mean(-1, keepdim=True)
            torch.testing.assert_close(centred, wide - mean, rtol=0, atol=1e-12)
            torch.testing.assert_close(narrow, centred[..., :-1], rtol=0, atol=1e-12)
            whole = layer_norm(wide, wide.shape[-1:], eps=1e-6)
            plain = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            torch.testing.assert_close(plain, whole, rtol=0, atol=1e-12)
    assert crms.lm_head.weight.shape[1] == model.config.hidden_size - 1


def test_a_norm_inside_the_branch_stays_and_the_wiring_is_hand_made(moved, logits):
    model = moved("sub_ln", norm=BARE)
    form = layernorm_to_rmsnorm(Form.of(model))
    assert named(form) is None
    inner = {sub.get("inner").op for sub in form.sublayers()}
    assert inner == {"layernorm"}
    assert far(logits(form), logits(model)) < EXACT


NOT_PRE_LN = "does not simply add its branch"


@pytest.mark.parametrize(
    ("conversion", "placement", "norm", "words"),
    [
        (layernorm_to_rmsnorm, "peri_ln", "layernorm", f"{NOT_PRE_LN}.*slot post"),
        (layernorm_to_rmsnorm, "post_ln", "layernorm", f"{NOT_PRE_LN}.*slot out"),
        (layernorm_to_rmsnorm, "residual_dual", "layernorm", "two residual streams"),
        (layernorm_to_rmsnorm, "pre_ln", "rmsnorm", "stands rmsnorm; .* begins with layernorm"),
        (layernorm_to_rmsnorm, "pre_ln", "dyt", "stands dyt"),
        (rmsnorm_to_crmsnorm, "pre_ln", "rmsnorm", r"the stream has a mean \(model.embed_tokens"),
        (rmsnorm_to_crmsnorm, "post_ln", "rmsnorm", NOT_PRE_LN),
        (rmsnorm_to_crmsnorm, "pre_ln", "dyt", "stands dyt"),
    ],
)
def test_what_cannot_be_converted_says_why(conversion, placement, norm, words, moved):
    with pytest.raises(ConfigError, match=words) as told:
        conversion(Form.of(moved(placement, norm=norm)))
    assert "\n" not in str(told.value)


def test_a_converted_model_converts_on_after_rounding_to_float32(moved, logits):
    model = moved("pre_ln", norm=BARE)
    form = Form.of(layernorm_to_rmsnorm(Form.of(model)).to_model().float())
    assert far(logits(rmsnorm_to_crmsnorm(form)), logits(model)) < 1e-5


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("ln"), "pre_ln", norm=BARE, qk_norm="per_head")


def test_the_command_writes_a_proven_folder(trained, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(trained, "--to", "crmsnorm", "--out", out) == 0
    said = capsys.readouterr().out
    assert "pre_ln + layernorm, qk_norm per_head is now pre_ln + crmsnorm, qk_norm per_head" in said
    assert "parity passed" in said
    parity = json.loads((out / "parity.json").read_text())
    assert parity["passed"]
    assert parity["errors"]["fold"]["rel"] < EXACT
    loaded = load(str(out))
    assert (loaded.model.config.norm["op"], loaded.model.config.hidden_size) == ("crmsnorm", 31)
    ids = torch.tensor([loaded.tokenizer("Some text")["input_ids"]])
    with torch.no_grad():
        wanted = load(str(trained)).model(ids).logits
        assert far(loaded.model(ids).logits, wanted) < 1e-4


def test_a_model_that_computes_something_else_leaves_nothing(trained, tmp_path, monkeypatch):
    wrong = {"passed": True, "failures": [], "errors": {"fold": {"rel": 1e-5}}, "summary": []}
    monkeypatch.setattr(exact, "certify", lambda *args, **options: wrong)
    with pytest.raises(ParityError, match=r"nothing is written: logits differ by 1\.0e-05"):
        run(trained, "--to", "rmsnorm", "--out", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_of_the_command_is_one_line_and_leaves_nothing(tmp_path):
    source = save(tmp_path / "peri", "peri_ln", norm="layernorm")
    with pytest.raises(LlmNormError, match=NOT_PRE_LN):
        run(source, "--to", "rmsnorm", "--out", tmp_path / "out")
    with pytest.raises(ConfigError, match="invalid choice: 'batchnorm'"):
        run(source, "--to", "batchnorm", "--out", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"peri"}
