"""The written lm-eval task runs from any directory and asks for the true continuation."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmnorm.data import Prepared, PrepareOptions, prepare
from llmnorm.data.sources import Text
from llmnorm.data.task import continuation_items, task_name, write_task
from llmnorm.errors import DataError

from .conftest import folder_bytes, make_documents


@pytest.fixture(scope="module")
def long_prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("task")
    (folder / "a b-C.txt").write_text("\n\n".join(make_documents(60, seed=3, words=150)))
    options = PrepareOptions(vocab_size=300, val_fraction=0.25)
    return prepare(Text(folder / "a b-C.txt", whole_files=False), folder / "out", options)


@pytest.mark.fast
def test_one_choice_goes_on_and_three_come_from_other_documents(long_prepared: Prepared) -> None:
    split = long_prepared.split("val")
    tokenizer = long_prepared.tokenizer()
    texts = [tokenizer.decode(tokens) for tokens, _ in split.documents_for_scoring()]
    items = continuation_items(long_prepared, 50)
    assert len(items) == 50
    for item in items:
        true = item["choices"][item["label"]]
        home = [i for i, text in enumerate(texts) if item["context"] + true in text]
        assert len(home) == 1
        for choice in item["choices"]:
            assert choice[0] == " "
            assert choice == " " + choice.strip()
            assert 60 <= len(choice) <= 80
            if choice != true:
                assert any(choice in text for i, text in enumerate(texts) if i != home[0])
        assert 40 <= len(item["context"]) <= 240
    labels = [item["label"] for item in items]
    assert {labels.count(label) > 5 for label in range(4)} == {True}


@pytest.mark.fast
def test_writing_twice_gives_the_same_files(long_prepared: Prepared) -> None:
    folder = write_task(long_prepared, 30)
    first = folder_bytes(folder)
    assert sorted(first) == [f"a_b_c_continuation.{end}" for end in ("jsonl", "py", "yaml")]
    assert folder_bytes(write_task(long_prepared, 30)) == first


@pytest.mark.fast
def test_too_few_documents_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(make_documents(20)))
    source = Text(tmp_path / "a.txt", whole_files=False)
    made = prepare(source, tmp_path / "out", PrepareOptions(vocab_size=300, val_fraction=0.1))
    with pytest.raises(DataError, match="validation documents have 100 characters of text"):
        write_task(made)


def test_lm_eval_runs_the_task_from_another_directory(
    long_prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = write_task(long_prepared, 20)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=long_prepared.vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
    model = LlamaForCausalLM(config)
    lm = HFLM(pretrained=model, tokenizer=long_prepared.tokenizer(), batch_size=8, device="cpu")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    name = task_name(long_prepared)
    results = lm_eval.simple_evaluate(
        model=lm, tasks=[name], task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    assert len(samples) == len(rows) == 20
    for sample, row in zip(samples, rows, strict=True):
        assert sample["doc"] == row
        asked = [tuple(request) for request in sample["arguments"]]
        assert asked == [(row["context"], choice) for choice in row["choices"]]
        scores = [float(response[0][0]) for response in sample["resps"]]
        assert sample["acc"] == float(scores.index(max(scores)) == row["label"])
    assert 0 <= results["results"][name]["acc,none"] <= 1
    assert results["results"][name]["acc,none"] == sum(s["acc"] for s in samples) / 20
