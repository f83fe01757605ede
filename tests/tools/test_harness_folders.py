"""lm-eval gives one score to a model, however its folder is opened."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from llmnorm.evaluation.harness import score_tasks
from llmnorm.evaluation.loading import load

TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
SUMS = """
task: sums_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory) -> Path:
    """Questions with four answers each, and their text as a stream."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"What is {n} plus {n}?", "choices": [f"It is {n + k}." for k in (0, n, 7, 9)]}
        for n in range(1, 17)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({**row, "answer": 1}) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(TASK.format(data=data))
    (folder / "sums_text.yaml").write_text(SUMS.format(data=data))
    return folder


def scores(model: Any, tokenizer: Any, task_folder: Path) -> dict[str, dict[str, Any]]:
    names = ["sums", "sums_text"]
    return score_tasks(model, tokenizer, names, include_path=task_folder, batch_size=4).tasks


def assert_equal_scores(one: Path, other: Path, task_folder: Path) -> None:
    """Two folders of one model, such as a run's and its export, score alike."""
    found = []
    for folder in (one, other):
        loaded = load(str(folder))
        found.append(scores(loaded.model, loaded.tokenizer, task_folder))
    for task, expected in found[0].items():
        for metric, score in expected.items():
            if isinstance(score, float):
                assert found[1][task][metric] == pytest.approx(score, rel=1e-5), (task, metric)


def test_the_folders_own_code_scores_as_the_native_model(folder, task_folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cls = get_class_from_dynamic_module("modeling_llmnorm.LlmNormForCausalLM", str(folder))
    native, foreign = AutoModelForCausalLM.from_pretrained(folder), cls.from_pretrained(folder)
    assert type(foreign).__module__.startswith("transformers_modules.")
    assert type(native).__module__ == "llmnorm.modeling.modeling_llmnorm"
    expected = scores(native.eval(), tokenizer, task_folder)
    assert scores(foreign.eval(), tokenizer, task_folder) == expected
    assert expected["sums_text"]["bits_per_byte"] > 0


def test_lm_evals_own_loading_gives_the_same_scores(folders, task_folder):
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = folders["rmsnorm", "peri_ln"]
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "device": "cpu", "dtype": "float32"},
        tasks=["sums", "sums_text"],
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
    )["results"]
    loaded = load(str(folder))
    ours = scores(loaded.model, loaded.tokenizer, task_folder)
    for task, metric in (("sums", "acc"), ("sums", "acc_norm"), ("sums_text", "bits_per_byte")):
        assert ours[task][metric] == pytest.approx(theirs[task][f"{metric},none"], rel=1e-6)


def test_a_folded_export_scores_the_same(folders, as_llama, task_folder):
    folder = folders["rmsnorm", "layerscale"]
    exported = as_llama(folder)
    assert type(AutoModelForCausalLM.from_pretrained(exported)).__name__ == "LlamaForCausalLM"
    assert_equal_scores(folder, exported, task_folder)


def test_the_comparison_can_fail(folders, task_folder):
    with pytest.raises(AssertionError):
        assert_equal_scores(*list(folders.values())[:2], task_folder)
