"""A tiny stock model with a byte-level tokenizer, saved once, and runs written by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

QUESTIONS = [
    {"question": "The cat", "choices": [" sat", " flew", " of", " xx"], "answer": 0},
    {"question": "Two and two", "choices": [" are four", " are five"], "answer": 0},
    {"question": "It is", "choices": [" so", " mat", " dog", " a", " by"], "answer": 3},
]

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


def byte_tokenizer(*, eos: bool = True) -> PreTrainedTokenizerFast:
    """Every byte is a token; end-of-text is id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT if eos else None
    )


def tiny_llama(**fields: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {
        "vocab_size": 257,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**{**shape, **fields}))


@pytest.fixture(scope="session")
def make_model(tmp_path_factory) -> Callable[..., Path]:
    """Save a stock Llama of 257 tokens and 128 positions with its byte-level tokenizer."""

    def make(*, tokenizer: bool = True, eos: bool = True, **fields: object) -> Path:
        folder = tmp_path_factory.mktemp("model")
        tiny_llama(**fields).save_pretrained(folder)
        if tokenizer:
            byte_tokenizer(eos=eos).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def model_folder(make_model) -> Path:
    return make_model()


@pytest.fixture
def text_file(tmp_path) -> Path:
    file = tmp_path / "some.txt"
    file.write_text("one document\n\nanother, naïve one\nof two lines\n\nx\n", encoding="utf-8")
    return file


@pytest.fixture
def make_run(tmp_path) -> Callable[..., Path]:
    """Write a run directory as training leaves it; `model` becomes its final/."""

    def make(
        name: str,
        *,
        placement: str = "pre_ln",
        norm: str = "rmsnorm",
        losses: list[float] | None = None,
        validation: dict[int, float] | None = None,
        seed: int = 0,
        model: Path | None = None,
        tokens_per_step: int = 512,
        fingerprint: str = "a" * 64,
    ) -> Path:
        run = tmp_path / name
        (run / "eval").mkdir(parents=True)
        config = {
            "model": {
                "preset": "debug",
                "norm": {"op": norm},
                "placement": {"name": placement},
                "overrides": {},
            },
            "data": {"path": "data/some", "seq_len": 32},
            "training": {"seed": seed, "global_batch_size": 16},
            "output": {"dir": str(run)},
        }
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        environment = {"data": {"fingerprint": fingerprint}}
        (run / "environment.json").write_text(json.dumps(environment))
        rows = []
        for step, loss in enumerate(losses or [5.0, 4.0, 3.0], start=1):
            row = {"step": step, "tokens": step * tokens_per_step, "train/loss": loss}
            row["perf/tokens_per_second"] = 1000.0 + step
            if validation and step in validation:
                row["val/loss"] = validation[step]
            rows.append(json.dumps(row) + "\n")
        (run / "metrics.jsonl").write_text("".join(rows))
        if model is not None:
            (run / "final").symlink_to(model, target_is_directory=True)
        return run

    return make


@pytest.fixture(scope="session")
def task_rows() -> list[dict[str, Any]]:
    """Three questions of 4, 2 and 5 choices."""
    return QUESTIONS


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory) -> Path:
    """lm-eval's file of the task `ours`, and of `lost`, whose data is not there."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "ours.yaml").write_text(TASK.format(name="ours", data=data))
    (folder / "lost.yaml").write_text(TASK.format(name="lost", data=folder / "absent.jsonl"))
    return folder
