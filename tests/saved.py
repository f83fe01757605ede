"""Saved models with a byte-level tokenizer, and a finished run written by hand."""

import json
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from wiring import model_of

from llmnorm import LlmNormForCausalLM

END = "<|end|>"
CHAT = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; the end of a text is id 0, and there is a chat template."""
    letters = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    made.chat_template = CHAT
    return made


def tiny(placement: Any, *, depth: int = 2, **options: Any) -> LlmNormForCausalLM:
    """A float32 model of 257 tokens and 64 positions, its gains moved off their starts."""
    shape = {"vocab_size": 257, "max_position_embeddings": 64}
    return model_of(placement, depth=depth, **{**shape, **options}).float()


def save(folder: Path, placement: Any, *, tokenizer: bool = True, **options: Any) -> Path:
    """Save a tiny model, with a tokenizer if asked."""
    tiny(placement, **options).save_pretrained(folder)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def save_run(path: Path, placement: str = "lns", norm: str = "rmsnorm", **options: Any) -> Path:
    """A run directory as training leaves it, with two evaluations."""
    save(path / "final", placement, norm=norm, **options)
    (path / "eval").mkdir()
    config = {
        "model": {"norm": {"op": norm}, "placement": {"name": placement}, "preset": "debug"},
        "data": {"path": "data/stories", "seq_len": 32},
        "optimizer": {"name": "adamw", "lr": 0.003, "weight_decay": 0.1},
        "schedule": {"name": "cosine"},
        "training": {"seed": 7, "global_batch_size": 16, "precision": "fp32"},
        "output": {"dir": str(path)},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"step": step, "tokens": 512 * step, "train/loss": 5.0} for step in (1, 1200)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = {"path": "data/stories", "fingerprint": "f" * 64, "weight": 1.0, "epochs": 2.0}
    folder["train_tokens"] = 307200
    environment = {
        "data": {"fingerprint": "f" * 64, "folders": [folder]},
        "versions": {"llmnorm": "0.1.0", "torch": "2.13.0"},
        "precision": {"name": "fp32"},
        "git_commit": "c0ffee",
    }
    (path / "environment.json").write_text(json.dumps(environment))
    perplexity = {
        "loss": 3.25,
        "perplexity": 25.79,
        "bits_per_byte": 1.125,
        "max_documents": None,
        "data_fingerprint": "f" * 64,
        "split": "val",
    }
    (path / "eval" / "perplexity-stories-val.json").write_text(json.dumps(perplexity))
    task = {"acc": 0.5, "acc_stderr": 0.125, "chance": 0.25, "higher_is_better": {"acc": True}}
    (path / "eval" / "harness-stories.json").write_text(json.dumps({"tasks": {"cats": task}}))
    return path
