"""Every kind of wiring, and every rule for weights, trains under ZeRO as it does in one process."""

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("deepspeed")

WORKER = """
import os
import sys
from types import SimpleNamespace

import torch

from llmnorm import build_config, build_model, self_test
from llmnorm.training.constraints import Constraints
from llmnorm.training.engines import choose_engine
from llmnorm.training.objective import Objective
from llmnorm.training.optimizer import make_optimizer
from llmnorm.training.precision import Precision

torch.set_num_threads(1)
SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 2}
SETTINGS = {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1, "betas": [0.9, 0.95]}
SETTINGS["eps"] = 1e-4  # 1e-8 would make whole steps of mere rounding
settings = SimpleNamespace(**SETTINGS, options={})


def batch(step):
    ids = torch.randint(64, (4, 9), generator=torch.Generator().manual_seed(step))
    targets = ids[:, 1:].clone()
    targets[0, 3:] = -100  # rank 0 has fewer targets
    return {"input_ids": ids[:, :-1], "targets": targets}


def alone(model):
    objective, optimizer = Objective(model), make_optimizer(model, settings)
    rules, losses = Constraints(model), []
    for step in range(1, 5):
        loss_sum, count = objective(**batch(step))
        (loss_sum / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with rules.around(step):
            optimizer.step()
        optimizer.zero_grad()
        losses.append((loss_sum / count).item())
    return losses


def sharded(engine, model):
    precision = Precision(name="fp32", device_type="cpu", reason="test")
    engine.prepare(Objective(model), lambda m: make_optimizer(m, settings), precision)
    self_test(model, fresh=True)
    model.train()
    rows, losses = slice(2 * engine.ranks.rank, 2 * engine.ranks.rank + 2), []
    for step in range(1, 5):
        own = {key: value[rows] for key, value in batch(step).items()}
        count, = engine.ranks.sums(float((own["targets"] >= 0).sum()))
        loss_sum = engine.backward([own], count)
        losses.append(
            engine.clip_and_step(loss_sum, count, factor=1.0, max_norm=1.0, step=step).loss
        )
    with torch.no_grad():  # called directly, as validation does
        assert model(input_ids=batch(0)["input_ids"]).logits.isfinite().all()
    engine.wrapped.destroy()
    return losses


engine = choose_engine()
kinds = [
    ("layernorm", "normformer"), ("rmsnorm", "mix_ln"), ("derf", "peri_ln"), ("dyt", "parallel"),
    ("rmsnorm", "gpas"), ("rmsnorm", "residual_dual"), ("rmsnorm", "siamese_norm"),
    ("bhyt", "bhyt"), ("l2norm", "ngpt"), ("rmsnorm", "nap"),
]
cases = [{"norm": norm, "placement": placement} for norm, placement in kinds]
cases += [
    {"norm": {"op": "tapernorm", "warmup_steps": 2, "taper_steps": 3}},
    {"weights": {"kind": "project", "interval_steps": 2}},
    {"weights": "weight_norm", "activation": "checkpointing"},
]
for choices in cases:
    recomputed = choices.pop("activation", None)
    expected = alone(build_model(build_config(SHAPE, **choices), seed=0))
    model = build_model(build_config(SHAPE, **choices), seed=0)
    if recomputed:
        model.activation_checkpointing_enable()
    seen = sharded(engine, model)
    distance = max(abs(a / b - 1) for a, b in zip(seen, expected, strict=True))
    print(f"CASE {choices}: {distance:.2e}", flush=True)
print("DONE", flush=True)
torch.distributed.barrier()
os._exit(0)
"""
TOLERANCE = 1e-6  # relative, losses of 4 steps, float32


@pytest.mark.parametrize("stage", [2, 3])
def test_shards_and_one_process_give_equal_losses(
    stage: int, tmp_path: Path, run_ranks: Callable[..., list[str]]
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    launched = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    output = run_ranks(script, timeout=240, **launched)[0]
    assert "DONE" in output
    cases = [line for line in output.splitlines() if line.startswith("CASE ")]
    assert len(cases) == 13
    wrong = [case for case in cases if not float(case.rpartition(": ")[2]) <= TOLERANCE]
    assert wrong == []


def test_a_rule_for_whole_gradients_is_refused_by_name() -> None:
    from llmnorm import build_config, build_model
    from llmnorm.errors import EnvironmentProblem
    from llmnorm.training.engines.deepspeed import model_rules

    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    model = build_model(build_config(shape, weights={"kind": "lawn", "free_steps": 2}))
    with pytest.raises(EnvironmentProblem, match=r"weights 'lawn' .* use configs/accelerate/ddp"):
        list(model_rules(model, lambda value: value))
