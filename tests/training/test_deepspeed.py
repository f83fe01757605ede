"""ZeRO with the real engine, two gloo processes each: losses, skips, model of one process."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmnorm.config import load_run_config
from llmnorm.data import Prepared
from llmnorm.training.loop import train
from llmnorm.training.manifest import verify

from .conftest import metrics, numbers, tiny_words

pytest.importorskip("deepspeed")

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ROOT / "train" / "pretrain.py"
STEPS = 20
TOLERANCE = 5e-7  # of the loss, relative, per step, float32
MUON_TOLERANCE = 1e-4  # its iteration runs in bfloat16; two DDP processes are 5e-6 from one
PATIENCE = 240  # seconds, on a machine that does other things too
RunRanks = Callable[..., list[str]]

# Rank 1 meets a bad step now and then: its loss, or an element of a gradient, is not finite.
# Writes down whether each left the rank's weights and moments as they were.
SPOILT = """
import json, math, sys
import torch
from llmnorm.config import load_run_config
from llmnorm.training import loop

BAD = {0: "loss", 7: math.nan, 8: -math.inf, 19: math.inf}
calls, unchanged = iter(range(100)), []
choose_engine = loop.choose_engine


def spoil(engine):
    last = engine.ranks.rank == engine.ranks.world - 1
    backward, clip_and_step = engine.backward, engine.clip_and_step

    def spoilt_backward(micro_batches, count):
        engine.bad = bad = BAD.get(next(calls))
        handles = []
        if last and isinstance(bad, float):
            def put(gradient):
                gradient = gradient.clone()
                gradient.view(-1)[3] = bad
                return gradient
            handles = [list(engine.parameters.values())[2].register_hook(put)]
        total = backward(micro_batches, count)
        for handle in handles:
            handle.remove()
        return total * math.nan if last and bad == "loss" else total

    def watched_step(*args, **kwargs):
        if engine.bad is None:
            return clip_and_step(*args, **kwargs)
        before = {piece.key: piece.tensor.clone() for piece in engine.pieces()}
        result = clip_and_step(*args, **kwargs)
        after = {piece.key: piece.tensor for piece in engine.pieces()}
        same = before.keys() == after.keys()
        same = same and all(torch.equal(before[key], after[key]) for key in after)
        unchanged.append(same and not result.applied)
        return result

    engine.backward, engine.clip_and_step = spoilt_backward, watched_step
    return engine


loop.choose_engine = lambda: spoil(choose_engine())
loop.train(load_run_config(None, sys.argv[1:]))
print("UNCHANGED", json.dumps(unchanged))
"""


def zero(stage: int, **more: str) -> dict[str, str]:
    """What a launcher sets for a stage."""
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        **more,
    }


def words(data: Prepared, output: Path, **changes: Any) -> list[str]:
    """A run whose ranks have unequal numbers of targets: 5 rows, micro-batches of 2."""
    settings = {
        "training__global_batch_size": 5,
        "training__micro_batch_size": 2,
        "training__max_steps": STEPS,
        "optimizer__lr": 3e-3,
        **changes,
    }
    return tiny_words(data.path, output, **settings)


def assert_close(left: Path, right: Path, tolerance: float = TOLERANCE) -> None:
    """Losses of both runs at every step, from the first that `right` has."""
    found = metrics(right)
    for one, other in zip(metrics(left)[-len(found) :], found, strict=True):
        assert other["skipped_steps"] == one["skipped_steps"]
        for key in ("train/loss", "val/loss"):
            if one.get(key) is not None:
                assert other[key] == pytest.approx(one[key], rel=tolerance), other["step"]


@pytest.fixture(scope="module")
def spoilt(data: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole batch at once in one process, with the same bad steps."""
    folder = tmp_path_factory.mktemp("spoilt")
    script = folder / "spoilt.py"
    script.write_text(SPOILT)
    arguments = words(data, folder / "run", training__micro_batch_size=None)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    done = subprocess.run(
        [sys.executable, str(script), *arguments],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert "UNCHANGED [true, true, true, true]" in done.stdout, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_losses_skipped_steps_and_the_model_are_those_of_one_process(
    stage: int, spoilt: Path, data: Prepared, tmp_path: Path, run_ranks: RunRanks
) -> None:
    """With bad steps first, twice in the middle, and last, and a checkpoint on a plain engine."""
    run = tmp_path / "run"
    outputs = run_ranks(spoilt / "spoilt.py", *words(data, run), timeout=PATIENCE, **zero(stage))
    assert all("UNCHANGED [true, true, true, true]" in output for output in outputs)
    assert_close(spoilt / "run", run)
    assert metrics(run)[-1]["skipped_steps"] == 4
    model, expected = (
        load_file(folder / "final" / "model.safetensors") for folder in (run, spoilt / "run")
    )
    assert model.keys() == expected.keys()
    for name, values in expected.items():
        assert torch.allclose(model[name], values, atol=1e-4), name


@pytest.mark.parametrize("stage", [3])  # the others: bars A3 and C2 of tests/reliability
def test_a_stopped_run_continues_bit_for_bit_and_anywhere(
    stage: int, data: Prepared, tmp_path: Path, run_ranks: RunRanks
) -> None:
    kept = {"checkpoint__interval_steps": 3, "checkpoint__keep": 100, "training__max_steps": 8}
    straight, again, alone, back = (tmp_path / n for n in ("straight", "again", "alone", "back"))
    outputs = run_ranks(PRETRAIN, *words(data, straight, **kept), timeout=PATIENCE, **zero(stage))
    assert f"2 processes, DeepSpeedEngine, ZeRO-{stage}" in outputs[0]
    middle = straight / "checkpoints" / "step_00000003"
    manifest = verify(middle)
    assert (manifest["engine"], manifest["world"]) == (f"zero{stage}", 2)
    kept["checkpoint__resume"] = str(middle)
    run_ranks(PRETRAIN, *words(data, again, **kept), timeout=PATIENCE, **zero(stage))
    assert numbers(again) == numbers(straight)[3:]
    train(load_run_config(None, words(data, alone, **kept)))
    assert_close(straight, alone, tolerance=1e-6)
    kept["checkpoint__resume"] = str(alone / "checkpoints" / "step_00000006")
    run_ranks(PRETRAIN, *words(data, back, **kept), timeout=PATIENCE, **zero(stage))
    assert_close(straight, back, tolerance=1e-6)


@pytest.mark.parametrize("stage", [3])  # the others: bar N3m
def test_muon_in_shards_gives_the_losses_of_whole_matrices(
    stage: int, data: Prepared, tmp_path: Path, run_ranks: RunRanks
) -> None:
    changes = {"optimizer__name": "muon", "training__max_steps": 10}
    run, alone = tmp_path / "run", tmp_path / "alone"
    run_ranks(PRETRAIN, *words(data, run, **changes), timeout=PATIENCE, **zero(stage))
    train(load_run_config(None, words(data, alone, **changes)))
    assert_close(alone, run, MUON_TOLERANCE)


def test_bfloat16_is_autocast_over_float32_weights_whose_gradients_travel_in_float32(
    data: Prepared, tmp_path: Path, run_ranks: RunRanks
) -> None:
    """Recomputed activations too. Sent in bfloat16, the first gradient's norm is 3e-4 away."""
    changes = {
        "training__precision": "bf16",
        "training__activation_checkpointing": True,
        "training__max_steps": 10,
    }
    run, pair = tmp_path / "run", tmp_path / "pair"
    settings = ROOT / "configs" / "deepspeed" / "zero3.json"
    file = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(settings)}
    run_ranks(PRETRAIN, *words(data, run, **changes), timeout=PATIENCE, **zero(3, **file))
    run_ranks(PRETRAIN, *words(data, pair, **changes), timeout=PATIENCE, ACCELERATE_USE_CPU="true")
    first, expected = metrics(run)[0], metrics(pair)[0]
    assert first["train/loss"] == pytest.approx(expected["train/loss"], rel=1e-9)
    assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)
    assert_close(pair, run, tolerance=2e-4)  # later steps round otherwise
    saved = load_file(run / "final" / "model.safetensors")
    assert {values.dtype for values in saved.values()} == {torch.float32}
