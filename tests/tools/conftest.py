"""Tiny models with a tokenizer, saved as a run's final/ is, and chats to train them on."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from llmnorm import build_config, build_model
from llmnorm.data.tokenizer import train_tokenizer
from llmnorm.evaluation.loading import load
from llmnorm.export import Form
from llmnorm.export.fitting import fit
from llmnorm.export.writing import write_folder

# Norms alone, norms after branches, no statistic at all, learned gains on branches.
SCHEMES = [
    ("rmsnorm", "pre_ln"),
    ("rmsnorm", "peri_ln"),
    ("derf", "pre_ln"),
    ("rmsnorm", "layerscale"),
]
CHATS = [
    [
        {"role": "user", "content": f"What is {number} plus {number}?"},
        {"role": "assistant", "content": f"It is {2 * number}."},
    ]
    for number in range(24)
]


@pytest.fixture(autouse=True)
def _own_accelerator() -> Iterator[None]:
    """Trainer and TRL leave states and variables behind that the next Accelerator would read."""
    from accelerate.state import AcceleratorState, PartialState

    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    AcceleratorState._reset_state()
    PartialState._reset_state()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer((turn["content"] for chat in CHATS for turn in chat), 300)


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory, tokenizer) -> Callable[..., Path]:
    """Save a model whose every parameter is off its start, with its tokenizer."""

    def make(norm: str = "rmsnorm", placement: str = "pre_ln", **fields: object) -> Path:
        shape = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        config = build_config({}, norm=norm, placement=placement, **{**shape, **fields})
        model, generator = build_model(config, seed=1), torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        folder = tmp_path_factory.mktemp(f"{placement}-{norm}")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def folders(make_folder) -> dict[tuple[str, str], Path]:
    """A folder for each of SCHEMES."""
    return {pair: make_folder(*pair) for pair in SCHEMES}


@pytest.fixture(scope="session")
def as_llama(tmp_path_factory) -> Callable[[Path], Path]:
    """Fold a folder of ours into a stock Llama's."""

    def export(folder: Path) -> Path:
        loaded, out = load(str(folder), dtype="fp64"), tmp_path_factory.mktemp("llama")
        write_folder(out, fit(Form.of(loaded.model), "llama"), loaded, torch.float32, "5GB")
        return out

    return export


@pytest.fixture(params=SCHEMES, ids=lambda pair: "-".join(reversed(pair)))
def folder(request, folders) -> Path:
    return folders[request.param]


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    return file


@pytest.fixture(scope="session")
def chats() -> list[dict[str, list[dict[str, str]]]]:
    """A question and its answer in each row."""
    return [{"messages": chat} for chat in CHATS]


@pytest.fixture(scope="session")
def ids(tokenizer) -> torch.Tensor:
    """Token ids (4, 16) of real text."""
    text = " ".join(turn["content"] for chat in CHATS for turn in chat)
    return torch.tensor(tokenizer.encode(text)[:64]).view(4, 16)
