"""The same global batch gives the same losses, however it is split."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmnorm import build_config, build_model
from llmnorm.config import RunConfig, load_run_config
from llmnorm.data import Prepared
from llmnorm.training.checkpoint import verify
from llmnorm.training.loop import train

from .conftest import metrics, numbers, tiny_words

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ROOT / "train" / "pretrain.py"
LOSS_TOLERANCE = 5e-7  # relative, per step, float32
STEPS = 20

Tiny = Callable[..., RunConfig]
RunRanks = Callable[..., list[str]]


def _words(data: Prepared, output: Path, **changes: Any) -> list[str]:
    # 5 sequences on 2 ranks with micro-batches of 2: one rank counts 3 rows, the other 2
    changes = {"training__global_batch_size": 5, "training__max_steps": STEPS, **changes}
    return tiny_words(data.path, output, optimizer__lr=3e-3, **changes)


def _assert_close(left: Path, right: Path) -> None:
    for one, other in zip(metrics(left), metrics(right), strict=True):
        assert other["train/loss"] == pytest.approx(one["train/loss"], rel=LOSS_TOLERANCE)
        if "val/loss" in one:
            assert other["val/loss"] == pytest.approx(one["val/loss"], rel=LOSS_TOLERANCE)


@pytest.fixture(scope="module")
def one_process(data: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process with the whole batch at once."""
    run = tmp_path_factory.mktemp("reference") / "run"
    train(load_run_config(None, _words(data, run)))
    return run


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_accumulation_changes_no_loss(
    micro_batch_size: int, one_process: Path, data: Prepared, tmp_path: Path
) -> None:
    words = _words(data, tmp_path / "run", training__micro_batch_size=micro_batch_size)
    train(load_run_config(None, words))
    _assert_close(one_process, tmp_path / "run")


def test_two_ddp_processes_with_unequal_targets_give_the_losses_of_one(
    one_process: Path, data: Prepared, tmp_path: Path, run_ranks: RunRanks
) -> None:
    """Accumulated too; one process then continues the checkpoint of two, and two that of one."""
    run = tmp_path / "ddp"
    words = _words(data, run, training__micro_batch_size=2)
    run_ranks(PRETRAIN, *words)
    _assert_close(one_process, run)
    manifest = verify(run / "checkpoints" / f"step_{STEPS:08d}")
    assert manifest["world"] == 2
    assert "optimizer-00001-of-00002.safetensors" in manifest["files"]


TAPER = {
    "model__norm": {"op": "tapernorm", "warmup_steps": 6, "taper_steps": 4, "momentum": 0.5},
    "training__max_steps": 14,
}

RECOMPUTED = {"training__activation_checkpointing": True}
COMPILED = {"training__compile": True}


def _constants(run: Path) -> torch.Tensor:
    """What the norms of a finished run have fitted."""
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    return torch.cat([module.c for module in model.modules() if hasattr(module, "after_step")])


@pytest.fixture(scope="module")
def one_tapered(data: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of TaperNorm in one process with the whole batch at once."""
    run = tmp_path_factory.mktemp("tapered") / "run"
    train(load_run_config(None, _words(data, run, **TAPER)))
    return run


@pytest.mark.parametrize(
    ("micro_batch_size", "changes"),
    [(2, {}), (1, RECOMPUTED), (3, COMPILED), (2, RECOMPUTED | COMPILED)],
    ids=["accumulated", "recomputed", "compiled", "both"],
)
# Dynamo reads .grad of the tensors it traces and then meets torch's own warning about it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_tapernorm_averages_over_all_micro_batches_and_no_padding(
    micro_batch_size: int,
    changes: dict[str, Any],
    one_tapered: Path,
    data: Prepared,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real, run = torch.compile, tmp_path / "run"
    monkeypatch.setattr(torch, "compile", lambda function, **_: real(function, backend="aot_eager"))
    changes = {**TAPER, "training__micro_batch_size": micro_batch_size, **changes}
    train(load_run_config(None, _words(data, run, **changes)))
    _assert_close(one_tapered, run)
    torch.testing.assert_close(_constants(run), _constants(one_tapered), rtol=1e-6, atol=0)


def test_tapernorm_averages_over_all_ranks(
    one_tapered: Path, data: Prepared, tmp_path: Path, run_ranks: RunRanks
) -> None:
    run = tmp_path / "run"
    run_ranks(PRETRAIN, *_words(data, run, training__micro_batch_size=2, **TAPER))
    _assert_close(one_tapered, run)
    torch.testing.assert_close(_constants(run), _constants(one_tapered), rtol=1e-6, atol=0)


def test_a_launcher_may_start_one_process(
    one_process: Path, data: Prepared, tmp_path: Path, run_ranks: RunRanks
) -> None:
    run_ranks(PRETRAIN, *_words(data, tmp_path / "run"), world=1)
    assert numbers(tmp_path / "run") == numbers(one_process)


# Rank 1 gets a signal before a step: the process ends, or both ranks save and leave.
SIGNALLED = """
import os, signal, sys
from llmnorm.config import load_run_config
from llmnorm.training import loop

number, step = getattr(signal, sys.argv[1]), int(sys.argv[2])
real = loop.Trainer.take_step

def take_step(self, batches):
    if self.step == step and self.ranks.rank == 1:
        os.kill(os.getpid(), number)
    return real(self, batches)

loop.Trainer.take_step = take_step
loop.train(load_run_config(None, sys.argv[3:]))
"""


def test_two_processes_stopped_and_killed_by_one_ranks_signal_continue_bit_for_bit(
    data: Prepared, tmp_path: Path, run_ranks: RunRanks
) -> None:
    straight, ended = tmp_path / "straight", tmp_path / "ended"
    changes = {"training__max_steps": 10, "checkpoint__interval_steps": 2}
    run_ranks(PRETRAIN, *_words(data, straight, **changes))
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED)
    run_ranks(script, "SIGTERM", 2, *_words(data, ended, **changes))
    leaving = json.loads((ended / "exit.json").read_text())
    assert (leaving["code"], leaving["step"]) == (75, 2)
    verify(ended / "checkpoints" / "step_00000002")
    with pytest.raises(AssertionError, match="a rank failed"):
        run_ranks(script, "SIGKILL", 7, *_words(data, ended, **changes))
    run_ranks(PRETRAIN, *_words(data, ended, **changes))
    assert numbers(ended) == numbers(straight)


# Rank 1 fails by itself; rank 0 then loses it in a collective.
FAILING = """
import sys, time
from llmnorm.config import load_run_config
from llmnorm.errors import DataError
from llmnorm.training import loop

real = loop.Trainer.take_step

def take_step(self, batches):
    if self.step == 3 and self.ranks.rank == 1:
        raise DataError("shard 7 is torn")
    return real(self, batches)

loop.Trainer.take_step = take_step
loop.train(load_run_config(None, sys.argv[1:]))
"""


def test_the_rank_that_fails_says_so_in_exit_json(
    data: Prepared, tmp_path: Path, run_ranks: RunRanks
) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    with pytest.raises(AssertionError, match="a rank failed"):
        run_ranks(script, *_words(data, tmp_path / "run"))
    leaving = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert leaving == {"code": 4, "rank": 1, "step": 3, "cause": "shard 7 is torn"}


# What two ranks share and what they do not, told by both through `gather`.
RANKS = """
import hashlib, sys
from datetime import timedelta

import torch
from llmnorm.config import load_run_config
from llmnorm.training import assembly, loop

real_group, real_model, timeouts = torch.distributed.init_process_group, assembly.make_model, []
real_step, real_finish = loop.Trainer.take_step, loop.Trainer.finish

def init_process_group(*args, **kwargs):
    timeouts.append(kwargs["timeout"])
    return real_group(*args, **kwargs)

def hashed(model):
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(weights).hexdigest()

def make_model(*args):
    model = real_model(*args)
    made.append(hashed(model))
    return model

def take_step(self, batches):
    state = torch.get_rng_state().sum().item()
    one, other = self.ranks.gather([made[0], hashed(self.model), state])
    assert one[:2] == other[:2], "weights differ"
    assert one[2] != other[2], "random states are equal"
    return real_step(self, batches)

def finish(self):
    seen = self.ranks.gather(["\\U0001f600\\udcff" * 3000 * (1 + self.ranks.rank)])
    assert [len(text) for text, in seen] == [6000, 12000], [len(text) for text, in seen]
    one, other = self.ranks.gather(hashed(self.model))
    assert one == other, "weights differ"
    real_finish(self)

made = []
torch.distributed.init_process_group = init_process_group
assembly.make_model = make_model
loop.Trainer.take_step = take_step
loop.Trainer.finish = finish
loop.train(load_run_config(None, sys.argv[1:]))
assert timeouts == [timedelta(hours=2)], timeouts
"""


def test_ranks_draw_other_random_numbers_and_keep_equal_weights(
    data: Prepared, tmp_path: Path, run_ranks: RunRanks
) -> None:
    """Dropout masks differ; any text can be gathered; ranks wait long for each other."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    words = _words(data, tmp_path / "run", training__max_steps=3)
    run_ranks(script, *words, "--model.overrides.attention_dropout", 0.3)


def test_each_gradient_is_that_of_the_global_mean_in_float64(
    tmp_path: Path, run_ranks: RunRanks
) -> None:
    """Rounding gone, so a wrong weight of a rank or micro-batch cannot hide."""
    script = tmp_path / "gradients.py"
    script.write_text(GRADIENTS)
    run_ranks(script, tmp_path)
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24}
    model = build_model(
        build_config({**shape, "num_hidden_layers": 1, "num_attention_heads": 2}), seed=0
    ).double()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(32, (6, 9), generator=generator)
    targets = torch.randint(32, (6, 9), generator=generator)
    for row in range(6):
        targets[row, row:] = -100
    log_p = torch.log_softmax(model(input_ids=ids).logits, dim=-1)
    counted = targets >= 0
    (-log_p[counted].gather(1, targets[counted][:, None]).mean()).backward()
    stored = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(stored[name], parameter.grad, rtol=1e-12, atol=1e-15)


GRADIENTS = """
import sys
import weakref

import torch
from llmnorm import build_config, build_model
from llmnorm.training.engines import choose_engine
from llmnorm.training.objective import Objective
from llmnorm.training.precision import Precision

engine = choose_engine()
shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24}
config = build_config({**shape, "num_hidden_layers": 1, "num_attention_heads": 2})
model = build_model(config, seed=0).double()
generator = torch.Generator().manual_seed(0)
ids = torch.randint(32, (6, 9), generator=generator)
targets = torch.randint(32, (6, 9), generator=generator)
for row in range(6):
    targets[row, row:] = -100
precision = Precision(name="fp32", device_type="cpu", reason="test")
engine.prepare(Objective(model), lambda m: torch.optim.SGD(m.parameters(), lr=0.0), precision)
# rank 0 gets rows 0, 1 | 4 and rank 1 rows 2, 3 | 5: unequal micro-batches and ranks
rows = [[0, 1], [4]] if engine.ranks.rank == 0 else [[2, 3], [5]]
batches = [{"input_ids": ids[r], "targets": targets[r]} for r in rows]
own = sum(int((b["targets"] >= 0).sum()) for b in batches)
count, = engine.ranks.sums(own)
engine.backward(batches, count)
if engine.ranks.is_main:
    torch.save({n: p.grad for n, p in model.named_parameters()}, sys.argv[1] + "/gradients.pt")

# DDP must be gone before its group, or the group's teardown may wait for ever
alive, destroy = weakref.ref(engine.wrapped), torch.distributed.destroy_process_group
seen = []
torch.distributed.destroy_process_group = lambda *a: (seen.append(alive()), destroy(*a))
engine.finish(None)
assert seen == [None], seen
assert not torch.distributed.is_initialized()
"""


@pytest.mark.fast
@pytest.mark.parametrize(
    ("variables", "said"),
    [
        (("ACCELERATE_USE_MEGATRON_LM",), "asked for Megatron-LM"),
        (("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"), "DeepSpeed and FSDP at once"),
        (("ACCELERATE_USE_FSDP",), "FSDP version 1"),
    ],
)
def test_an_engine_that_is_not_there_is_refused_by_name(
    variables: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmnorm.errors import EnvironmentProblem
    from llmnorm.training.engines import choose_engine

    for variable in variables:
        monkeypatch.setenv(variable, "true")
    with pytest.raises(EnvironmentProblem, match=said):
        choose_engine()


@pytest.mark.fast
def test_processes_that_do_not_find_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmnorm.errors import EnvironmentProblem
    from llmnorm.training.engines.plain import PlainEngine

    engine = PlainEngine(cpu=True)
    assert engine.ranks.world == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EnvironmentProblem, match="started 2 processes but 1"):
        PlainEngine(cpu=True)
