"""Score a model on lm-evaluation-harness tasks, through its Python API.

Beside every multiple-choice score stands its chance level, and beside all scores what they depend
on: batch size, precision, window, versions, and which token begins a text. Local task files work
without a network. Needs the extra `eval` (the package lm-eval), imported when used.
"""

import contextlib
import difflib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch.distributed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmnorm.errors import ConfigError, DataError, EnvironmentProblem
from llmnorm.evaluation.quiet import quiet

_FEWSHOT_SEED = 1234  # lm-eval's own default, so that few-shot examples agree with its command line


@dataclass(frozen=True)
class HarnessScores:
    """Scores of tasks and of groups that aggregate them; `context` is what they depend on."""

    tasks: dict[str, dict[str, Any]]
    """Per task: its metrics, `*_stderr` of accuracies, `chance`, `samples`, `num_fewshot`,
    `version`, and `higher_is_better` per metric."""
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    context: dict[str, Any] = field(default_factory=dict)


def score_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seq_len: int | None = None,
    rank: int = 0,
    world: int = 1,
) -> HarnessScores | None:
    """Run lm-eval on a loaded model.

    Args:
        model: a causal language model on its device.
        tokenizer: with an end-of-text or beginning-of-text token.
        names: tasks, groups or tags.
        include_path: folder of task files; when it has all `names`, lm-eval's own are not read.
        limit: documents per task, for trials; None for all.
        batch_size: sequences per forward.
        seq_len: longest input; default the model's maximum positions.
        rank: this process, when several share the requests.
        world: number of processes; above 1 needs a process group.

    Returns:
        The scores on rank 0, None on the others.

    Raises:
        EnvironmentProblem: lm-eval is not installed.
        ConfigError: an unknown task, an empty folder, or a tokenizer without a token to begin with.
        DataError: a task whose data cannot be read.
    """
    _import_lm_eval()
    with quiet(), _errors_only():
        tasks = _load_tasks(names, include_path)
        lm = _language_model(model, tokenizer, batch_size, seq_len)
        _share(lm, rank, world)
        found = _evaluate(lm, tasks, limit)
    if found is None:
        return None
    return HarnessScores(
        tasks={
            name: _task_scores(name, task, found, limit) for name, task in tasks["tasks"].items()
        },
        groups={name: _metrics(scores) for name, scores in found.get("groups", {}).items()},
        context={
            "batch_size": batch_size,
            "limit": limit,
            "seq_len": lm.max_length,
            "dtype": str(model.dtype).removeprefix("torch."),
            "softmax_dtype": "float32",
            "bos": _bos_policy(lm, tokenizer),
        },
    )


def chance_level(task: Any, limit: int | None = None) -> float | None:
    """Accuracy of blind guessing: the mean over documents of right choices / choices.

    None for tasks that are not multiple choice. `limit` as in `score_tasks`.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return None
    shares = []
    for doc in islice(task.eval_docs, limit):
        choices = task.doc_to_choice(doc) if hasattr(task, "doc_to_choice") else doc["choices"]
        target = task.doc_to_target(doc)
        right = len(target) if isinstance(target, list) else 1
        shares.append(right / len(choices))
    return math.fsum(shares) / len(shares)


def _import_lm_eval() -> None:
    try:
        import lm_eval.models.huggingface
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise EnvironmentProblem(
            f"the harness needs lm-eval, which cannot be imported ({error});"
            " install it with: pip install 'llmnorm[eval]'"
        ) from error


def _load_tasks(names: Sequence[str], include_path: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"include path {include_path} is not a folder; expected task files in it")
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=include_path, include_defaults=True)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.5)
            known = f"near names: {', '.join(near)}" if near else "no name is near it"
            raise ConfigError(
                f"unknown task {name!r}; {known}; add task files of your own with --include-path"
            )
    try:
        loaded = manager.load(list(names))
    except Exception as error:  # task files run code of their own; any of it may fail
        raise DataError(
            f"the data of {', '.join(names)} cannot be loaded:"
            f" {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return loaded


def _language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    seq_len: int | None,
) -> Any:
    from lm_eval.models.huggingface import HFLM

    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer names neither a beginning-of-text nor an end-of-text token, from which"
            " a task with an empty context is scored; name one with --eos-token TOKEN"
        )
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=seq_len,
        softmax_dtype="float32",
        device=str(model.device),
    )


def _share(lm: Any, rank: int, world: int) -> None:
    """Let the processes divide the requests; HFLM takes a loaded model for a lone process."""
    if world == 1:
        return
    if not torch.distributed.is_initialized():
        raise EnvironmentProblem(
            f"scoring over {world} ranks needs a process group and none is initialized;"
            " start the program with accelerate launch"
        )
    from accelerate import Accelerator

    lm.accelerator = Accelerator(cpu=lm.device.type == "cpu")
    lm._rank, lm._world_size = rank, world


def _evaluate(lm: Any, tasks: Any, limit: int | None) -> Any:
    from lm_eval import evaluator

    try:
        return evaluator.evaluate(lm, tasks, limit=limit, log_samples=False, bootstrap_iters=0)
    except AssertionError as error:  # lm-eval asserts that an answer fits; a context is cut instead
        raise ConfigError(
            f"a task has an answer that does not fit into {lm.max_length} tokens;"
            " use a longer --seq-len, up to the model's positions"
        ) from error


def _task_scores(
    name: str, task: Any, found: Mapping[str, Any], limit: int | None
) -> dict[str, Any]:
    scores = _metrics(found["results"][name])
    samples = found["n-samples"][name]["effective"]
    for metric in [key for key in scores if key.split(",")[0] in ("acc", "acc_norm")]:
        share = scores[metric]
        if samples > 1:  # the standard error of a mean of zeros and ones
            scores[f"{metric}_stderr"] = math.sqrt(share * (1 - share) / (samples - 1))
    chance = chance_level(task, limit)
    return {
        **scores,
        **({} if chance is None else {"chance": chance}),
        "samples": samples,
        "num_fewshot": found["n-shot"][name],
        "version": found["versions"][name],
        "higher_is_better": found["higher_is_better"][name],
    }


def _metrics(scores: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's `acc,none` as `acc`; a metric after a filter keeps the filter's name."""
    return {
        key.removesuffix(",none"): value
        for key, value in scores.items()
        if isinstance(value, float) and "_stderr" not in key
    }


def _bos_policy(lm: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Which token an empty context is scored from, and whether the tokenizer adds one to texts."""
    added = len(tokenizer.encode("a")) - len(tokenizer.encode("a", add_special_tokens=False))
    return {
        "prefix_token": tokenizer.convert_ids_to_tokens(lm.prefix_token_id),
        "prefix_token_id": lm.prefix_token_id,
        "special_tokens_added_to_texts": added,
    }


@contextlib.contextmanager
def _errors_only() -> Iterator[None]:
    """Silence lm-eval's warnings, which are notes for the authors of tasks."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
