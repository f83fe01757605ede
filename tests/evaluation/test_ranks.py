"""Two processes score what one does."""

import json
from pathlib import Path

import numpy as np
import pytest

from llmnorm.evaluation.harness import score_tasks
from llmnorm.evaluation.loading import load
from llmnorm.evaluation.perplexity import score_documents

WORKER = Path(__file__).with_name("rank_worker.py")


@pytest.mark.timeout(180)
def test_two_ranks_give_the_numbers_of_one(model_folder, task_folder, tmp_path, run_ranks):
    run_ranks(WORKER, model_folder, task_folder, tmp_path, world=2, timeout=120)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    loaded = load(str(model_folder))
    rng = np.random.default_rng(3)
    documents = [(rng.integers(1, 257, size=n), n) for n in (5, 90, 17, 1, 40, 33, 64)]
    alone = score_documents(loaded.model, documents, eos_token_id=0, seq_len=16, batch_size=4)

    assert first["score"] == second["score"]
    assert first["score"]["loss"] == pytest.approx(alone.loss, rel=1e-6)
    for count in ("tokens", "bytes", "documents"):
        assert first["score"][count] == getattr(alone, count)
    # sharded engines communicate in every forward, so a rank more or less would hang
    assert first["forwards"] == second["forwards"]

    message = "every rank must be given the same documents"
    assert message in (first["other_documents"] or "") + (second["other_documents"] or "")

    names, folder = ["ours"], task_folder
    tasks = score_tasks(loaded.model, loaded.tokenizer, names, include_path=folder).tasks
    assert second["harness"] is None
    assert first["harness"]["ours"]["acc"] == pytest.approx(tasks["ours"]["acc"])
    assert first["harness"]["ours"]["acc_norm"] == pytest.approx(tasks["ours"]["acc_norm"])
    assert first["harness"]["ours"]["chance"] == pytest.approx(tasks["ours"]["chance"])
