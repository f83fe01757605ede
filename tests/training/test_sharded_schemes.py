"""Every placement, norm and rule for weights trains in shards as it does in whole copies.

In float64, so that rounding hides nothing.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

WORKER = """
import os
import sys
from types import SimpleNamespace

import torch
from exact_muon import zeropower
from torch.distributed.tensor import DTensor
from torch.optim import _muon

from llmnorm import build_config, build_model, list_norms, list_placements, self_test
from llmnorm.training.engines.fsdp2 import FSDP2Engine
from llmnorm.training.engines.plain import PlainEngine
from llmnorm.training.objective import Objective
from llmnorm.training.optimizer import make_optimizer
from llmnorm.training.precision import Precision

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 2}
SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "betas": [0.9, 0.95], "eps": 1e-8, "options": {}}


_muon._zeropower_via_newtonschulz = zeropower


def train(engine, optimizer, choices):
    model = build_model(build_config(SHAPE, **choices), seed=0).double()
    settings = SimpleNamespace(name=optimizer, **SETTINGS)
    precision = Precision(name="fp32", device_type="cpu", reason="test")
    engine.prepare(Objective(model), lambda m: make_optimizer(m, settings), precision)
    self_test(model, fresh=True)
    model.train()
    rank, seen = engine.ranks.rank, []
    generator = torch.Generator().manual_seed(5)
    for step in range(1, 21 if optimizer == "muon" else 6):
        ids = torch.randint(64, (4, 9), generator=generator)
        targets = ids[:, 1:].clone()
        targets[0, 3:] = -100  # rank 0 has fewer targets
        rows = slice(2 * rank, 2 * rank + 2)
        batch = {"input_ids": ids[rows, :-1], "targets": targets[rows]}
        count, = engine.ranks.sums(float((batch["targets"] >= 0).sum()))
        loss_sum = engine.backward([batch], count)
        result = engine.clip_and_step(loss_sum, count, factor=1.0, max_norm=1.0, step=step)
        assert result.applied
        seen.append(result.loss)
    model.eval()
    with torch.no_grad():  # called directly, as validation does
        seen.append(model(input_ids=torch.arange(16).view(2, 8)).logits.double().norm().item())
    return torch.tensor(seen, dtype=torch.float64), model


own_norms = {"ngpt": "l2norm", "bhyt": "bhyt"}
cases = [
    ("adamw", {"placement": name, "norm": own_norms.get(name, "rmsnorm")})
    for name in list_placements()
]
cases += [("adamw", {"norm": name}) for name in list_norms() if name != "none"]
cases += [("muon", {})]
cases += [
    ("adamw", {"weights": {"kind": "project", "interval_steps": 2}}),
    ("adamw", {"weights": {"kind": "lawn", "free_steps": 2}}),
    ("adamw", {"weights": "unit"}),
    ("adamw", {"weights": "weight_norm"}),
    ("adamw", {"norm": {"op": "tapernorm", "warmup_steps": 2, "taper_steps": 3}}),
]
plain = PlainEngine(cpu=True)
os.environ.update(FSDP_VERSION="2")
sharded = FSDP2Engine(cpu=True)
for optimizer, choices in cases:
    expected, _ = train(plain, optimizer, choices)
    seen, model = train(sharded, optimizer, choices)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    distance = (seen / expected - 1).abs().max().item()
    print(f"CASE {optimizer} {choices}: {distance:.2e}", flush=True)
print("DONE", flush=True)
torch.distributed.barrier()
os._exit(0)
"""
TESTS = Path(__file__).resolve().parents[1]
TOLERANCE = 1e-10  # relative, losses of 5 steps (muon: 20) and a norm of logits, float64


@pytest.mark.timeout(200)
def test_shards_and_whole_copies_give_equal_losses(
    tmp_path: Path, run_ranks: Callable[..., list[str]]
) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    output = run_ranks(script, timeout=180, PYTHONPATH=str(TESTS))[0]
    assert "DONE" in output
    cases = [line for line in output.splitlines() if line.startswith("CASE ")]
    assert len(cases) >= 50
    wrong = [case for case in cases if float(case.rpartition(": ")[2]) > TOLERANCE]
    assert wrong == []
