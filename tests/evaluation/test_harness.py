"""lm-eval scores beside the chance level, from task files alone."""

import builtins

import pytest
import torch

from llmnorm.errors import ConfigError, DataError, EnvironmentProblem
from llmnorm.evaluation.harness import score_tasks
from llmnorm.evaluation.loading import load


@pytest.fixture(scope="module")
def loaded(model_folder):
    return load(str(model_folder))


def log_likelihood(loaded, context: str, continuation: str) -> float:
    before, after = (loaded.tokenizer.encode(text) for text in (context, continuation))
    with torch.no_grad():
        logits = loaded.model(torch.tensor([before + after])).logits[0]
    log_p = logits.log_softmax(-1)
    return sum(log_p[len(before) + i - 1, token].item() for i, token in enumerate(after))


def test_accuracy_is_that_of_a_hand_made_loop_and_stands_beside_chance(
    loaded, task_folder, task_rows
):
    right, right_norm = 0, 0
    for row in task_rows:
        scores = [log_likelihood(loaded, row["question"], choice) for choice in row["choices"]]
        per_byte = [s / len(c) for s, c in zip(scores, row["choices"], strict=True)]
        right += scores.index(max(scores)) == row["answer"]
        right_norm += per_byte.index(max(per_byte)) == row["answer"]
    found = score_tasks(
        loaded.model, loaded.tokenizer, ["ours"], include_path=task_folder, batch_size=3
    )
    scores = found.tasks["ours"]
    assert scores["acc"] == pytest.approx(right / 3)
    assert scores["acc_norm"] == pytest.approx(right_norm / 3)
    assert scores["chance"] == pytest.approx((1 / 4 + 1 / 2 + 1 / 5) / 3)
    assert scores["samples"] == 3


def test_what_the_score_depends_on_is_recorded(loaded, task_folder):
    found = score_tasks(
        loaded.model,
        loaded.tokenizer,
        ["ours"],
        include_path=task_folder,
        limit=2,
        batch_size=5,
        seq_len=64,
    )
    assert found.tasks["ours"]["samples"] == 2
    assert found.tasks["ours"]["chance"] == pytest.approx((1 / 4 + 1 / 2) / 2)
    context = found.context
    assert (context["batch_size"], context["limit"], context["seq_len"]) == (5, 2, 64)
    assert context["dtype"] == "float32"
    assert context["bos"]["prefix_token"] == "<|endoftext|>"
    assert context["bos"]["special_tokens_added_to_texts"] == 0


def test_nothing_reaches_stdout(loaded, task_folder, capsys):
    score_tasks(loaded.model, loaded.tokenizer, ["ours"], include_path=task_folder)
    assert capsys.readouterr().out == ""


def test_an_unknown_task_suggests_near_names(loaded, task_folder):
    with pytest.raises(ConfigError, match=r"unknown task 'our'; near names:.*\bours\b"):
        score_tasks(loaded.model, loaded.tokenizer, ["our"], include_path=task_folder)


def test_missing_task_data_and_folders_are_named(loaded, task_folder):
    with pytest.raises(DataError, match="lost"):
        score_tasks(loaded.model, loaded.tokenizer, ["lost"], include_path=task_folder)
    with pytest.raises(ConfigError, match="is not a folder"):
        score_tasks(loaded.model, loaded.tokenizer, ["ours"], include_path=task_folder / "absent")


def test_a_tokenizer_without_a_first_token_is_refused(make_model, task_folder):
    loaded = load(str(make_model(eos=False)))
    with pytest.raises(ConfigError, match="--eos-token"):
        score_tasks(loaded.model, loaded.tokenizer, ["ours"], include_path=task_folder)


def test_a_missing_lm_eval_says_what_to_install(loaded, task_folder, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("lm_eval"):
            raise ImportError("No module named 'lm_eval'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'llmnorm\[eval\]'"):
        score_tasks(loaded.model, loaded.tokenizer, ["ours"], include_path=task_folder)


def test_an_answer_longer_than_the_window_is_explained(loaded, task_folder):
    with pytest.raises(ConfigError, match="does not fit into 4 tokens"):
        score_tasks(loaded.model, loaded.tokenizer, ["ours"], include_path=task_folder, seq_len=4)


def test_the_local_tasks_run_without_a_network(make_model, shared_folder):
    loaded = load(str(make_model(max_position_embeddings=1024)))
    found = score_tasks(
        loaded.model,
        loaded.tokenizer,
        ["public_local"],
        include_path=shared_folder / "data" / "tasks",
        limit=2,
    )
    chance = {name: scores.get("chance") for name, scores in found.tasks.items()}
    assert chance["blimp_local"] == chance["piqa_local"] == chance["wsc273_local"] == 0.5
    assert chance["arc_easy_local"] == pytest.approx(0.25, abs=0.05)
    assert chance["lambada_openai_local"] is None
    assert found.tasks["wikitext2_test_local"]["bits_per_byte"] > 0
