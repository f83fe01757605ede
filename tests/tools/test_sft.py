"""train/sft.py as a person uses it: the launcher, the resulting folder, and one-line errors."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import disable_progress_bars, enable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmnorm.errors import ConfigError, DataError, EnvironmentProblem
from llmnorm.evaluation.loading import load
from llmnorm.training import finetuning

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--max_steps", "3", "--save_strategy", "no", "--report_to", "none", "--bf16", "false"]


@pytest.fixture
def sft():
    """The script's main, with a model's folder and other words; no progress bars."""
    spec = importlib.util.spec_from_file_location("sft_script", ROOT / "train" / "sft.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules["sft_script"] = script  # where dataclasses look for what annotations mean
    spec.loader.exec_module(script)
    disable_progress_bars()
    yield lambda *words: script.main([*map(str, words), "--disable_tqdm", "true", *SHORT])
    enable_progress_bars()
    del sys.modules["sft_script"]


def test_the_launcher_fine_tunes_and_the_folder_loads_everywhere(folders, chat_file, tmp_path):
    model, out = folders["rmsnorm", "peri_ln"], tmp_path / "out"
    words = ["--model", model, "--data", chat_file, "--output_dir", out, "--learning_rate", "1e-2"]
    launcher = ["accelerate.commands.launch", "--config_file", ROOT / "configs/accelerate/cpu.yaml"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, ROOT / "train/sft.py", *words, *SHORT],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"the fine-tuned model is in {out}" in done.stderr
    before, after = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (model, out))
    assert before.keys() == after.keys()
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert "generation" in AutoTokenizer.from_pretrained(out).chat_template
    assert load(str(out)).model.config.placement == {"name": "peri_ln"}
    assert (out / "modeling_llmnorm.py").is_file()
    assert not list(out.glob("*.bin"))


def test_adapters_are_merged_and_gains_do_not_decay(sft, folders, chat_file, tmp_path):
    model, out = folders["rmsnorm", "layerscale"], tmp_path / "out"
    decay = ["--weight_decay", 0.5, "--learning_rate", "1e-2", "--lora_rank", 2]
    sft("--model", model, "--data", chat_file, "--output_dir", out, *decay)
    before, after = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (model, out))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "_proj." in name}


def test_texts_are_trained_on_too_and_the_tokenizer_stays_as_it_is(sft, folders, tmp_path):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows.write_text(json.dumps({"text": "What is 1 plus 1?"}) + "\n")
    sft("--model", folders["derf", "pre_ln"], "--data", rows, "--output_dir", out)
    assert AutoTokenizer.from_pretrained(out).chat_template is None


@pytest.mark.parametrize(
    ("rows", "words", "error", "says"),
    [
        ('{"a": 1}', [], DataError, "has 1 rows of a; expected messages, or prompt"),
        ('{"a": ', [], DataError, "cannot be read: JSON parse error"),
        ('{"messages": [{"role": 1}]}', [], DataError, "expected role and content"),
        (None, ["--data", "absent.jsonl"], DataError, "absent.jsonl does not exist"),
        (None, ["--data", "a.jsonl", "b"], DataError, "b is no jsonl file"),
        (None, ["--data", "a", "b"], DataError, "expected files, or one hub name"),
        (None, ["--model", "./absent"], ConfigError, "./absent does not exist"),
        (None, ["--learning_rate", "fast"], ConfigError, "invalid float value: 'fast'"),
        (None, ["--lerning_rate", "1"], ConfigError, "--lerning_rate"),
        (None, ["--eos_token", "<end>"], ConfigError, "<end> is not a token"),
    ],
)
def test_mistakes_are_one_line(sft, folders, chat_file, tmp_path, rows, words, error, says):
    data = tmp_path / "rows.jsonl" if rows else chat_file
    if rows:
        data.write_text(rows + "\n")
    given = [
        "--model",
        folders["rmsnorm", "pre_ln"],
        "--data",
        data,
        "--output_dir",
        tmp_path / "o",
    ]
    with pytest.raises(error, match=says) as raised:
        sft(*given, *words)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "o").exists()


def test_nothing_is_written_over_a_model(sft, folders, chat_file):
    model = folders["rmsnorm", "pre_ln"]
    with pytest.raises(ConfigError, match=r"already holds config.json; choose another"):
        sft("--model", model, "--data", chat_file, "--output_dir", model)


def test_a_scheme_that_needs_our_trainer_is_refused(sft, make_folder, chat_file, tmp_path):
    model = make_folder("l2norm", "ngpt")
    with pytest.raises(ConfigError, match=r"weights are 'unit'.*pretrain"):
        sft("--model", model, "--data", chat_file, "--output_dir", tmp_path / "out")


@pytest.mark.fast
def test_a_missing_package_says_what_to_install():
    with pytest.raises(EnvironmentProblem, match=r"pip install 'llmnorm\[sft\]'"):
        finetuning.needed("a_package_that_is_not_there", "sft")
