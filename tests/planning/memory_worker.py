"""Train and write what a rank really held in its last step, in bytes.

    python memory_worker.py RESULTS WORDS.json

`weights`, `gradients` and `moments` are the storages that the model and its optimizer hold;
`beyond` is the most that torch's allocator gave out in that step beside what was held before it.
(A profile of the whole run would miss what the threads of gloo free. They free it when they come
to it; FSDP2's collectives wait for them here, so that the same step measures the same.)
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from llmnorm.config import load_run_config
from llmnorm.training import loop

stepped = {}  # parameters that the optimizer was given
gradients = [0]  # bytes of their gradients


def storages(tensors):
    """Bytes of the tensors' storages, each once."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors if t is not None]
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}
    return sum(size for pointer, size in found.items() if pointer)


def note(optimizer, *_):
    """Note what is stepped; DeepSpeed gives its optimizer one group at a time."""
    given = [p for group in optimizer.param_groups for p in group["params"]]
    new = [p for p in given if p.grad is not None and p not in stepped]
    gradients[0] += storages([p.grad for p in new])
    stepped.update(dict.fromkeys(new))


def sizes(trainer):
    """What is held after a step."""
    model, optimizer = list(trainer.model.parameters()), trainer.engine.optimizer
    sharded = [getattr(p, "ds_tensor", None) for p in model]
    states = [v for state in optimizer.state.values() for v in state.values()]
    return {
        "weights": storages([*model, *sharded, *stepped]),
        "gradients": gradients[0],
        "moments": storages([v for v in states if isinstance(v, torch.Tensor)]),
    }


def peak(profiler):
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def patient(collective):
    """The collective, which leaves gloo's threads the time to free what they hold."""

    def run(*args, **kwargs):
        work = collective(*args, **kwargs)
        time.sleep(0.01)
        return work

    return run


def main(results, words):
    rank = os.environ["RANK"]
    if os.environ["WORLD_SIZE"] == "1":  # as without a launcher
        for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[variable]
    real = loop.Trainer.take_step

    config = load_run_config(None, json.loads(Path(words).read_text()))
    held = {}

    def take_step(self, *args):
        if self.step + 1 < config.training.max_steps:
            return real(self, *args)
        stepped.clear()
        gradients[0] = 0
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, profile_memory=True) as profiler:
            outcome = real(self, *args)
        held.update(sizes(self), beyond=peak(profiler))
        return outcome

    for name in ("all_gather_single", "reduce_scatter_single"):
        setattr(torch.distributed, name, patient(getattr(torch.distributed, name)))
    loop.Trainer.take_step = take_step
    register_optimizer_step_pre_hook(note)
    assert loop.train(config) == 0
    Path(results, f"rank{rank}.json").write_text(json.dumps(held))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
