"""What may be given as a model, and what is said when it may not."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from llmnorm import build_config, build_model
from llmnorm.errors import CheckpointError, ConfigError
from llmnorm.evaluation.loading import find, load
from llmnorm.modeling import operations

pytestmark = pytest.mark.fast


def test_a_run_stands_for_its_final_folder(make_run, model_folder):
    run = make_run("run", model=model_folder)
    for given in (run, run / "final"):
        source = find(str(given))
        assert (source.location, source.run) == (str(run / "final"), run)
    assert load(str(run)).seq_len(None) == 32  # as trained


def test_an_unfinished_run_says_so(make_run):
    with pytest.raises(CheckpointError, match="unfinished run"):
        find(str(make_run("run")))


def test_a_stock_model_is_read_in_its_own_precision_and_to_its_positions(model_folder):
    loaded = load(str(model_folder))
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    assert loaded.seq_len(None) == 128
    assert loaded.seq_len(7) == 7
    assert load(str(model_folder), dtype="bf16").model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["./absent", "/absent", "a/b/c"])
def test_a_folder_that_is_not_there_is_never_looked_up_on_the_hub(name):
    with pytest.raises(ConfigError, match="does not exist"):
        find(name)


def test_a_misspelt_run_beside_others_is_never_looked_up_on_the_hub(
    make_run, tmp_path, monkeypatch
):
    (tmp_path / "runs").mkdir()
    make_run("run").rename(tmp_path / "runs" / "mix_ln")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="runs has other runs; did you mean mix_ln"):
        find("runs/mixln")
    assert find("someone/mixln").location == "someone/mixln"  # a name on the hub


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="neither a run nor a model"):
        find(str(tmp_path))


def test_absent_tensors_are_an_error_and_not_random_numbers(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 of the model's tensors.*layers\.1\.mlp\.up_proj"):
        load(str(folder))


def test_constants_that_older_checkpoints_carry_are_no_unknown_tensors(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(str(folder)).model


def test_weights_that_are_not_finite_are_not_scored_by_any_measure(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][3, 3] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"\(lm_head.weight\), so the loss is not finite"):
        load(str(folder))


def test_damaged_weights_name_the_folder(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load(str(folder))


def test_code_in_a_folder_is_not_run_unless_asked(make_model):
    folder = make_model()
    ran = folder / "ran"
    (folder / "config.json").write_text(
        '{"model_type": "foreign", "auto_map": {"AutoConfig": "code.C",'
        ' "AutoModelForCausalLM": "code.M"}}'
    )
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        load(str(folder))
    assert not ran.exists()


def test_no_tokenizer_is_made_up_for_a_class_that_has_a_usual_one(tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
    Qwen3ForCausalLM(Qwen3Config(**shape, **heads)).save_pretrained(tmp_path)
    assert load(str(tmp_path)).tokenizer is None


def test_a_model_without_a_tokenizer_can_be_given_one(make_model, model_folder):
    bare = make_model(tokenizer=False)
    with pytest.raises(ConfigError, match="--tokenizer"):
        load(str(bare)).require_tokenizer()
    assert load(str(bare), tokenizer=str(model_folder)).require_tokenizer().eos_token_id == 0


def test_the_end_of_text_token_can_be_named(make_model):
    folder = str(make_model(eos=False))
    assert load(folder).require_tokenizer().eos_token_id is None
    assert load(folder, eos_token="<|endoftext|>").require_tokenizer().eos_token_id == 0
    with pytest.raises(ConfigError, match="is not a token"):
        load(folder, eos_token="<absent>")


def test_unknown_tensors_are_an_error_and_not_left_out(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.extra.weight"] = torch.ones(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors .* not the model's.*layers\.0\.extra"):
        load(str(folder))


@pytest.mark.parametrize("content", ['{"a": ', "{}", '{"version": "1.0", "added_tokens": 3}'])
def test_a_damaged_tokenizer_is_not_taken_for_none(model_folder, tmp_path, content):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="cannot be opened as a tokenizer"):
        load(str(folder))


def test_a_norm_that_is_not_registered_says_to_import_its_module(tmp_path, monkeypatch):
    monkeypatch.setitem(operations.OPERATIONS, "mynorm", operations.OPERATIONS["rmsnorm"])
    monkeypatch.setattr(operations, "_NORMS", [*operations._NORMS, "mynorm"])
    config = build_config("debug", norm="mynorm", num_hidden_layers=1)
    build_model(config).save_pretrained(tmp_path)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"unknown norm 'mynorm'.*import the module"):
        load(str(tmp_path))
