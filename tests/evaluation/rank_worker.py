"""One of several processes that score the same documents; writes what it got to OUT/rankR.json."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch.distributed as dist

from llmnorm.errors import LlmNormError
from llmnorm.evaluation.harness import score_tasks
from llmnorm.evaluation.loading import load
from llmnorm.evaluation.perplexity import score_documents
from llmnorm.processes import leave_process_group


def main(model: str, tasks: str, out: str) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    loaded = load(model)
    forwards = []
    loaded.model.register_forward_hook(lambda *_: forwards.append(1))
    rng = np.random.default_rng(3)
    documents = [(rng.integers(1, 257, size=n), n) for n in (5, 90, 17, 1, 40, 33, 64)]
    options = {"eos_token_id": 0, "seq_len": 16, "batch_size": 4, "rank": rank, "world": world}
    found = {"score": asdict(score_documents(loaded.model, documents, **options))}
    found["forwards"] = len(forwards)
    try:
        score_documents(loaded.model, documents[rank:], **options)
        found["other_documents"] = None
    except LlmNormError as error:
        found["other_documents"] = str(error)
    harness = score_tasks(
        loaded.model, loaded.tokenizer, ["ours"], include_path=Path(tasks), rank=rank, world=world
    )
    found["harness"] = harness and harness.tasks
    Path(out, f"rank{rank}.json").write_text(json.dumps(found))
    leave_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
