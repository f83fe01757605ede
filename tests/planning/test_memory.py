"""What `llmnorm validate` says of memory is what a run then holds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmnorm.cli import run_command
from llmnorm.planning import command

WORKER = Path(__file__).with_name("memory_worker.py")
TOLERANCE = 0.05
ENGINES = {
    "plain": {"ACCELERATE_USE_CPU": "true"},
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    **{
        f"zero{stage}": {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
        for stage in (1, 2, 3)
    },
}
BUCKET = 1_000_000  # elements; DeepSpeed's default would hide everything else


@pytest.fixture
def both(
    words: Callable[..., list[str]],
    run_ranks: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., tuple[dict[str, Any], dict[str, Any]]]:
    """Return what is predicted for rank 0, and what it then holds."""

    def run(engine: str, world: int, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        overrides = words(**changes)
        options = ["--processes", str(world), "--engine", engine, "--json"]
        variables = dict(ENGINES[engine])
        if engine.startswith("zero"):
            zero = {"stage": int(engine[-1]), "overlap_comm": True, "reduce_bucket_size": BUCKET}
            settings, launcher = tmp_path / "zero.json", tmp_path / "launcher.yaml"
            settings.write_text(json.dumps({"zero_optimization": zero}))
            config = {"deepspeed_config_file": str(settings)}
            file = {"distributed_type": "DEEPSPEED", "deepspeed_config": config}
            launcher.write_text(json.dumps({**file, "num_processes": world}))
            options = ["--accelerate", str(launcher), "--json"]
            variables["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(settings)
        assert run_command(command, "llmnorm validate", [*options, *overrides]) == 0
        predicted = json.loads(capsys.readouterr().out)["memory"]["engines"][engine]
        (tmp_path / "words.json").write_text(json.dumps(overrides))
        arguments = [WORKER, tmp_path, tmp_path / "words.json"]
        run_ranks(*arguments, world=world, timeout=200, **variables)
        return predicted, json.loads((tmp_path / "rank0.json").read_text())

    return run


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training__activation_checkpointing": True, "training__micro_batch_size": 2},
        {"optimizer__name": "muon", "data__document_mask": True, "training__precision": "bf16"},
    ],
    ids=["whole batch", "recomputed and accumulated", "muon in bf16"],
)
def test_the_peak_of_one_process_is_predicted(both, changes):
    predicted, measured = both("plain", 1, **changes)
    peak = measured["weights"] + measured["moments"] + measured.pop("beyond")
    assert predicted == pytest.approx({**predicted, **measured, "peak": peak}, rel=TOLERANCE)


@pytest.mark.parametrize("micro_batch_size", [3, 1], ids=["one micro-batch", "accumulated"])
def test_the_peak_of_ddp_is_predicted_with_its_buckets(both, micro_batch_size):
    predicted, measured = both("ddp", 2, training__micro_batch_size=micro_batch_size)
    buckets = measured["gradients"]  # which stay from step to step
    peak = measured["weights"] + measured["moments"] + buckets + measured.pop("beyond")
    assert predicted == pytest.approx({**predicted, **measured, "peak": peak}, rel=TOLERANCE)


@pytest.mark.parametrize("engine", ["fsdp2", "zero1", "zero2", "zero3"])
def test_shards_and_peak_of_a_rank_are_predicted(both, engine):
    predicted, measured = both(engine, 2)
    compared = ["weights", "moments", *(["gradients"] if engine != "zero1" else [])]
    peak = measured["weights"] + measured["moments"] + measured["beyond"]
    if engine == "zero3":  # which keeps its bucket and its gradients' place from step to step
        peak += 4 * BUCKET + measured["gradients"]
    assert predicted["peak"] == pytest.approx(peak, rel=TOLERANCE)
    for part in compared:
        assert predicted[part] == pytest.approx(measured[part], rel=TOLERANCE), part
