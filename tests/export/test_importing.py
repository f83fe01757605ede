"""`llmnorm import`: people's models become ours, proven equal, or one line says why not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved import byte_tokenizer, save
from transformers import AutoTokenizer, MixtralConfig

from llmnorm import LlmNormForCausalLM
from llmnorm.cli import run_command
from llmnorm.config.start import read_start
from llmnorm.errors import CheckpointError, ConfigError, LlmNormError, ParityError
from llmnorm.evaluation.loading import load
from llmnorm.evaluation.perplexity import score_documents
from llmnorm.export import Form, importing
from llmnorm.export.fitting import fit
from llmnorm.export.form import HEAD
from llmnorm.export.hosts import HOSTS, Host
from llmnorm.export.stranger import Widened

EXACT = 1e-9  # of the logits' standard deviation, in float64
ROUNDED = 5e-6  # the same where a factor that comes in was rounded to float32
FACTORS = ("gemma2", "gemma3", "granite")
SHAPE = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
READABLE = [host for host in HOSTS.values() if host.placement is not None]
IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": 0}
TEXT = torch.arange(24).reshape(2, 12) * 7 % 257


def save_stock(
    folder: Path, name: str, dtype: torch.dtype = torch.float32, shard: str = "5GB", **settings: Any
) -> Path:
    """Save a model of a host's class with biases, moved weights and a tokenizer of 257 entries."""
    host = HOSTS[name]
    given: dict[str, Any] = {**SHAPE, **IDS, **host.fixed}
    if not host.has("num_key_value_heads"):
        del given["num_key_value_heads"]
    given |= {"layer_types": ["full_attention"] * 2} if host.has("layer_types") else {}
    given |= {"rope_parameters": host.rope(5000.0)} if host.position == "rope" else {}
    given |= {"head_dim": 16} if host.has("head_dim") else {}
    given |= {flag: True for flag in host.biases if flag}
    given |= {"query_pre_attn_scalar": 16} if "gemma" in name else {}
    given |= {"attention_multiplier": 8**-0.5} if name == "granite" else {}
    torch.manual_seed(5)
    model = host.model_class(host.config_class(**{**given, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.generation_config.update(do_sample=True, top_k=7)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    byte_tokenizer().save_pretrained(folder)
    return folder


def bring(*words: object) -> int:
    return run_command(importing, "llmnorm import", [str(word) for word in words])


@pytest.fixture
def unproven(monkeypatch) -> None:
    """Imports without the other process: these tests compare for themselves."""
    good = {"passed": True, "summary": ["parity passed"], "failures": []}
    monkeypatch.setattr(importing, "certify", lambda *args, **options: good)


@torch.no_grad()
def far(got: Path, wanted: Path, dtype: str = "fp64") -> float:
    """How far apart two folders' logits are, in standard deviations."""
    with Widened():
        true = load(str(wanted), dtype=dtype).model(TEXT).logits
    found = load(str(got), dtype=dtype).model(TEXT).logits
    return float((found - true).abs().max() / true.std())


@pytest.mark.parametrize("host", READABLE, ids=lambda host: host.name)
def test_every_readable_class_comes_in_under_a_schemes_name_and_leaves_as_it_was(
    host: Host, tmp_path, unproven
):
    stock, out = save_stock(tmp_path / "stock", host.name), tmp_path / "ours"
    bring(stock, "--out", out)
    assert far(out, stock) < (ROUNDED if host.name in FACTORS else EXACT)
    model = load(str(out)).model
    assert isinstance(model, LlmNormForCausalLM)
    assert model.config.placement["name"] == _name(host.placement)
    assert read_start(out).norm["op"] == host.op  # as `model.start` reads it
    back = fit(Form.of(model), host.name)
    assert back is not None
    written = host.write(back.form, torch.float32)
    kept = load(str(stock)).model.state_dict()
    if back.form.tied:
        del kept[f"{HEAD}.weight"]
    assert written.keys() == kept.keys()
    for name, tensor in kept.items():
        torch.testing.assert_close(written[name].float(), tensor, rtol=1e-6, atol=1e-7, msg=name)


def _name(placement: Any) -> str:
    return placement if isinstance(placement, str) else placement["name"]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    """A tied bfloat16 model in several files; sqrt(32) is no bfloat16."""
    folder = tmp_path_factory.mktemp("gemma")
    return save_stock(
        folder, "gemma2", torch.bfloat16, shard="20KB", tie_word_embeddings=True, pad_token_id=0
    )


def test_the_command_writes_a_whole_folder_and_proves_it(gemma, tmp_path, capsys):
    out = tmp_path / "deep" / "ours"
    assert bring(gemma, "--out", out) == 0
    said = capsys.readouterr().out
    assert "Gemma2ForCausalLM is sandwich_ln + rmsnorm, embedding scale, tied head" in said
    assert "parity passed" in said
    assert f"--model.start {out}" in said
    parity = json.loads((out / "parity.json").read_text())
    assert parity["passed"]
    assert parity["errors"]["class"]["rel"] < 1e-8
    assert {path.name for path in out.parent.iterdir()} == {"ours"}
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert (config["pad_token_id"], config["eos_token_id"]) == (0, 0)
    assert "AutoModelForCausalLM" in config["auto_map"]
    assert json.loads((out / "generation_config.json").read_text())["top_k"] == 7
    text = "Some text.\n"
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(gemma)(text)
    stock, ours = load(str(gemma)).model, load(str(out)).model
    scale = stock.model.embed_tokens.embed_scale.bfloat16()
    assert torch.equal(ours.model.embedding_scale.weight, scale.reshape(1))
    assert far(out, gemma, "bf16") < 0.1
    assert torch.equal(ours.lm_head.weight, stock.lm_head.weight)


def test_an_imported_folder_is_evaluated_like_any_other(tmp_path, unproven):
    stock, out = save_stock(tmp_path / "stock", "qwen3"), tmp_path / "ours"
    bring(stock, "--out", out)
    documents = [(TEXT[0].numpy(), 12), (TEXT[1].numpy(), 12)]
    mine, theirs = (
        score_documents(load(str(folder)).model, documents, eos_token_id=0, seq_len=8).loss
        for folder in (out, stock)
    )
    assert mine == pytest.approx(theirs, abs=1e-6)


def test_the_precision_is_kept_unless_asked(tmp_path, unproven, capsys):
    stock = save_stock(tmp_path / "stock", "llama", torch.float16)
    bring(stock, "--out", tmp_path / "same")
    bring(stock, "--out", tmp_path / "other", "--dtype", "bf16")
    kinds = [load(str(tmp_path / name)).model.dtype for name in ("same", "other")]
    assert kinds == [torch.float16, torch.bfloat16]
    assert "in bfloat16" in capsys.readouterr().out


def test_an_id_outside_the_vocabulary_is_left_out_and_told(tmp_path, unproven, capsys):
    stock = save_stock(tmp_path / "stock", "llama")
    content = json.loads((stock / "config.json").read_text())
    content |= {"pad_token_id": -1, "eos_token_id": [0, 999]}
    (stock / "config.json").write_text(json.dumps(content))
    bring(stock, "--out", tmp_path / "ours")
    said = capsys.readouterr().out
    assert "pad_token_id -1 is outside the vocabulary and left out" in said
    assert load(str(tmp_path / "ours")).model.config.eos_token_id == [0]


def test_generation_settings_that_contradict_themselves_are_left_out(tmp_path, unproven, capsys):
    stock = save_stock(tmp_path / "stock", "llama")
    settings = {"do_sample": False, "top_k": 7, "eos_token_id": 0}
    (stock / "generation_config.json").write_text(json.dumps(settings))
    bring(stock, "--out", tmp_path / "ours")
    assert "generation_config.json is left out, it contradicts" in capsys.readouterr().out
    kept = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    assert kept["eos_token_id"] == 0
    assert "top_k" not in kept


def test_a_model_that_computes_something_else_leaves_nothing(tmp_path, monkeypatch):
    stock = save_stock(tmp_path / "stock", "llama")
    bad = {"passed": False, "summary": [], "failures": ["logits differ by 3"]}
    monkeypatch.setattr(importing, "certify", lambda *args, **options: bad)
    with pytest.raises(ParityError, match="LlamaForCausalLM, so nothing is written: logits differ"):
        bring(stock, "--out", tmp_path / "ours")
    assert {path.name for path in tmp_path.iterdir()} == {"stock"}


def _edited(stock: Path, **fields: Any) -> None:
    content = json.loads((stock / "config.json").read_text())
    (stock / "config.json").write_text(json.dumps({**content, **fields}))


def _pickled(stock: Path) -> None:
    (stock / "model.safetensors").rename(stock / "pytorch_model.bin")


def _incomplete(stock: Path) -> None:
    tensors = load_file(stock / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, stock / "model.safetensors", metadata={"format": "pt"})


SCALED = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
BAD = {
    "no config": (lambda f: (f / "config.json").unlink(), ConfigError, "neither a run nor a model"),
    "unknown class": (
        lambda f: MixtralConfig(architectures=["MixtralForCausalLM"]).save_pretrained(f),
        ConfigError,
        "is a MixtralForCausalLM; classes that can come in: LlamaForCausalLM, Qwen3ForCausalLM",
    ),
    "unknown type": (lambda f: _edited(f, model_type="new"), ConfigError, "cannot be opened"),
    "number as text": (
        lambda f: _edited(f, num_attention_heads="four"),
        ConfigError,
        "'num_attention_heads': TypeError: .* expected int, got str",
    ),
    "scaled RoPE": (
        lambda f: _edited(f, rope_parameters=SCALED),
        ConfigError,
        "is a LlamaForCausalLM that cannot come in: rope_type is 'linear'",
    ),
    "quantized": (
        lambda f: _edited(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        ConfigError,
        "holds quantized weights",
    ),
    "pickled weights": (_pickled, CheckpointError, "pickled weights"),
    "missing tensors": (_incomplete, CheckpointError, "1 of the model's tensors are not in its"),
    "code from outside": (
        lambda f: _edited(f, attn_implementation="someone/kernels"),
        ConfigError,
        "code from outside",
    ),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_stock(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_come_in_is_told_in_one_line(what, llama, tmp_path):
    spoil, kind, words = BAD[what]
    stock = shutil.copytree(llama, tmp_path / "stock")
    spoil(stock)
    with pytest.raises(LlmNormError, match=words) as told:
        bring(stock, "--out", tmp_path / "ours")
    assert type(told.value) is kind
    assert "\n" not in str(told.value)
    assert {path.name for path in tmp_path.iterdir()} == {"stock"}


def test_a_model_of_llmnorm_needs_no_import(tmp_path):
    ours = save(tmp_path / "ours", "pre_ln")
    with pytest.raises(ConfigError, match="a model of llmnorm already"):
        bring(ours, "--out", tmp_path / "again")


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_a_place_is_no_name_of_a_folder(out, llama, tmp_path, monkeypatch):
    (inside := tmp_path / "inside").mkdir()
    monkeypatch.chdir(inside)
    with pytest.raises(ConfigError, match="is a place, not a name"):
        bring(llama, "--out", out)
    assert list(tmp_path.iterdir()) == [inside]


def test_a_folder_that_is_there_is_not_touched(llama, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        bring(llama, "--out", tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
