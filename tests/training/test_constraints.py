"""What holds after every step: unit rows, constant norms, modules that move by the step."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from llmnorm import build_config, build_model
from llmnorm.config import RunConfig
from llmnorm.training.checkpoint import verify
from llmnorm.training.constraints import Constraints
from llmnorm.training.engines.plain import PlainEngine
from llmnorm.training.loop import train
from llmnorm.training.optimizer import make_optimizer

from .conftest import Killed, metrics, numbers, stop_after

Tiny = Callable[..., RunConfig]
RunRanks = Callable[..., list[str]]

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
OUTPUT = ("o_proj", "down_proj")


def _model(**fields: Any) -> Any:
    return build_model(build_config(SHAPE, **fields), seed=0)


def _optimizer(model: Any, name: str = "adamw", *, decay: float = 0.1) -> Any:
    options: dict[str, Any] = {}
    settings = {"lr": 0.02, "weight_decay": decay, "betas": [0.9, 0.95], "eps": 1e-8}
    return make_optimizer(model, SimpleNamespace(name=name, options=options, **settings))


def _steps(
    model: Any, count: int, *, constrained: bool = True, first: int = 1, decay: float = 0.1
) -> Iterator[int]:
    """Steps with the same random gradients for every model; yields after each."""
    optimizer, constraints = _optimizer(model, decay=decay), Constraints(model)
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        if constrained:
            with constraints.around(step):
                optimizer.step()
        else:
            optimizer.step()
        yield step


def _matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }


def _norms(model: nn.Module, *, blocks: bool) -> torch.Tensor:
    weights = _matrices(model)
    return torch.stack([w.norm() for n, w in weights.items() if (".layers." in n) == blocks])


def _assert_unit(model: nn.Module) -> None:
    for name, weight in _matrices(model).items():
        lengths = weight.norm(dim=0 if name.endswith(OUTPUT) else 1)
        torch.testing.assert_close(lengths, torch.ones_like(lengths), msg=name)


# --- one step ---------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mlp", ["gated", "plain"])
def test_unit_rows_hold_at_the_start_and_after_every_step(mlp: str, tied: bool) -> None:
    """Along the hidden axis: what reads the stream row by row, what writes it column by column."""
    model = _model(weights="unit", mlp=mlp, tie_word_embeddings=tied)
    _assert_unit(model)
    assert len(_matrices(model)) == 2 * (7 if mlp == "gated" else 6) + 2
    before = model.lm_head.weight.detach().clone()
    for _ in _steps(model, 3):
        _assert_unit(model)
    assert (model.lm_head.weight - before).abs().max() > 0.01
    assert (model.model.norm.weight - 1).abs().max() > 0.01  # gains are free


@pytest.mark.fast
def test_projection_brings_the_matrices_of_blocks_back_every_so_many_steps() -> None:
    model = _model(weights={"kind": "project", "interval_steps": 2}, init="scaled")
    start = torch.tensor([w.numel() ** 0.5 * 0.02 for w in _matrices(model.model).values()])
    scaled = [0.5 if n.endswith(OUTPUT) else 1.0 for n in _matrices(model.model)]
    expected = (start * torch.tensor(scaled))[1:]  # the first is the embedding
    ends = _norms(model, blocks=False)
    for step in _steps(model, 4):
        found = _norms(model, blocks=True)
        if step % 2 == 0:
            torch.testing.assert_close(found, expected)
        else:
            assert ((found - expected).abs() > 0.01 * expected).all()
    assert (_norms(model, blocks=False) > 1.05 * ends).all()  # embedding and head are free


@pytest.mark.fast
def test_projection_keeps_the_direction_that_the_optimizer_chose() -> None:
    free, projected = _model(), _model(weights="project")
    for _ in zip(_steps(free, 1), _steps(projected, 1), strict=True):
        pass
    for name, weight in _matrices(projected).items():
        other = _matrices(free)[name]
        cosine = (weight * other).sum() / (weight.norm() * other.norm())
        assert cosine.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.fast
def test_lawn_is_free_first_and_then_keeps_every_norm() -> None:
    lawn, plain = _model(weights={"kind": "lawn", "free_steps": 2}), _model()
    kept = None
    free = _steps(plain, 6, constrained=False, decay=0.0)  # LAWN's are not decayed
    for step in zip(_steps(lawn, 6), free, strict=True):
        if step[0] <= 2:
            for one, other in zip(lawn.model.layers, plain.model.layers, strict=True):
                for name, parameter in one.named_parameters():
                    assert torch.equal(parameter, other.get_parameter(name)), name
            kept = _norms(lawn, blocks=True)
            continue
        torch.testing.assert_close(_norms(lawn, blocks=True), kept, rtol=1e-5, atol=0)
    assert (_norms(plain, blocks=True) > 1.05 * kept).all()


@pytest.mark.fast
def test_lawn_steps_along_the_tangent_and_returns_to_the_sphere() -> None:
    """w' = |w| (w - lr t) / |w - lr t|,  t = g - (g . w) w / |w|^2."""
    model = _model(weights="lawn").double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    wanted = {}
    for name, weight in _matrices(model).items():
        w, g = weight.detach().clone(), weight.grad.clone()
        if ".layers." in name:
            moved = w - 0.1 * (g - (g * w).sum() / (w * w).sum() * w)
            wanted[name] = w.norm() * moved / moved.norm()
        else:
            wanted[name] = w - 0.1 * g
    with Constraints(model).around(1):
        optimizer.step()
    for name, weight in _matrices(model).items():
        torch.testing.assert_close(weight.detach(), wanted[name], msg=name)


@pytest.mark.fast
@pytest.mark.parametrize("weights", ["plain", "weight_norm"])
def test_other_weights_step_as_the_optimizer_does(weights: str) -> None:
    one, other = _model(weights=weights), _model(weights=weights)
    for _ in zip(_steps(one, 2), _steps(other, 2, constrained=False), strict=True):
        pass
    for left, right in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.fast
def test_frozen_matrices_are_left_alone() -> None:
    model = _model(weights="unit")
    model.model.embed_tokens.weight.requires_grad_(False)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2.0)
    with Constraints(model).around(1):
        pass
    assert model.model.embed_tokens.weight.norm(dim=1).min() > 1.9


class Counter(nn.Module):
    """Counts steps; measures `value` in the first step alone."""

    def __init__(self, *value: float) -> None:
        super().__init__()
        self.value = torch.tensor(value)
        self.seen: list[tuple[int, list[float] | None]] = []

    def measured(self, step: int) -> torch.Tensor | None:
        return self.value if step == 1 else None

    def after_step(self, step: int, means: torch.Tensor | None) -> None:
        self.seen.append((step, None if means is None else means.tolist()))


@pytest.mark.fast
def test_modules_that_move_by_the_step_are_called_after_it_with_one_mean_over_ranks() -> None:
    model, calls = _model(), []
    one = model.model.layers[0].counter = Counter(4.0)
    two = model.model.layers[1].counter = Counter(6.0, 8.0)

    def mean(value: torch.Tensor) -> torch.Tensor:
        calls.append(value.shape)
        return value / 2

    constraints = Constraints(model, mean)
    for step in (1, 2):
        with constraints.around(step):
            assert len(one.seen) == step - 1
    assert one.seen == [(1, [2.0]), (2, None)]
    assert two.seen == [(1, [3.0, 4.0]), (2, None)]
    assert calls == [(3,)]


@pytest.mark.fast
def test_moving_tapernorms_waits_for_the_device_nowhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No number is read from a tensor: on a GPU each would be a wait for all queued work."""
    norm = {"op": "tapernorm", "warmup_steps": 2, "taper_steps": 2}
    model, calls = _model(norm=norm).train(), []
    constraints = Constraints(model, lambda value: calls.append(value.shape) or value)
    for name in ("item", "tolist", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a number was read"))
    for step in range(1, 6):
        model.model(torch.zeros(1, 3, dtype=torch.long))
        with constraints.around(step):
            pass
    monkeypatch.undo()
    assert calls == [(12,), (12,)]
    assert [m.gate.item() for m in constraints.moving] == [0.0] * 4


@pytest.mark.fast
def test_a_failing_step_moves_nothing() -> None:
    model = _model(weights="unit")
    counter = model.counter = Counter(1.0)
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="no step"), Constraints(model).around(1):
        raise RuntimeError("no step")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert counter.seen == []


# --- whole runs -------------------------------------------------------------------------------

TAPER = {"model__norm__op": "tapernorm", "model__norm__warmup_steps": 5}
RULES = {
    "unit": {"model__overrides__weights": "unit"},
    "project": {"model__overrides__weights": {"kind": "project", "interval_steps": 5}},
    "lawn": {"model__overrides__weights": {"kind": "lawn", "free_steps": 7}},
    "weight_norm": {"model__overrides__weights": "weight_norm"},
    "tapernorm": {**TAPER, "model__norm__taper_steps": 4},
}


@pytest.mark.parametrize("rule", RULES)
def test_a_stopped_run_continues_bit_for_bit(
    rule: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**RULES[rule], "eval__interval_steps": 0}
    straight, stopped = tiny("straight", **changes), tiny("stopped", **changes)
    train(straight)
    stop_after(8, monkeypatch, Killed())
    with pytest.raises(Killed):
        train(stopped)
    train(stopped)
    assert numbers(stopped.output.dir) == numbers(straight.output.dir)
    files = [
        verify(c.output.dir / "checkpoints/step_00000012")["files"] for c in (straight, stopped)
    ]
    assert files[0] == files[1]
    losses = [record["train/loss"] for record in metrics(straight.output.dir)]
    assert losses[-1] < losses[0] - 0.5


def test_a_run_that_starts_from_a_tapered_model_leaves_it_tapered(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its steps begin at 1, and so they do where the run is stopped within the warm-up."""
    first = tiny("first", **RULES["tapernorm"])
    train(first)
    then = tiny("then", training__init_from=str(first.output.dir / "final"), **RULES["tapernorm"])
    stop_after(4, monkeypatch, Killed())
    with pytest.raises(Killed):
        train(then)
    train(then)
    one, other = (
        AutoModelForCausalLM.from_pretrained(config.output.dir / "final")
        for config in (first, then)
    )
    norms = [name for name, m in one.named_modules() if hasattr(m, "after_step")]
    assert len(norms) == 4
    for name in norms:
        before, after = one.get_submodule(name), other.get_submodule(name)
        assert after.gate.item() == 0.0
        assert torch.equal(after.c, before.c)
        assert (after.taper_weight - before.taper_weight).abs().max() < 0.2
    losses = [metrics(config.output.dir)[-1]["train/loss"] for config in (first, then)]
    assert losses[1] < losses[0]
    assert "still normalizes" not in caplog.text


def test_a_run_too_short_to_taper_says_so_once(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    train(tiny(model__norm__op="tapernorm", training__max_steps=1))
    (told,) = [record.message for record in caplog.records if "tapernorm" in record.message]
    assert "warmup_steps + taper_steps = 2000 steps, this run has 1" in told


def _poison(steps: set[int], monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Make these (0-based) steps unsound; record whether all tensors stayed as they were."""
    real = PlainEngine.clip_and_step
    unchanged: list[bool] = []
    calls = iter(range(100))

    def clip_and_step(self: PlainEngine, *args: Any, **kwargs: Any) -> Any:
        if next(calls) not in steps:
            return real(self, *args, **kwargs)
        next(p for p in self.parameters.values() if p.grad is not None).grad.view(-1)[0] = torch.nan
        before = [piece.tensor.clone() for piece in self.pieces()]
        result = real(self, *args, **kwargs)
        after = [piece.tensor for piece in self.pieces()]
        unchanged.append(all(torch.equal(a, b) for a, b in zip(before, after, strict=True)))
        return result

    monkeypatch.setattr(PlainEngine, "clip_and_step", clip_and_step)
    return unchanged


@pytest.mark.parametrize("rule", ["project", "lawn", "tapernorm"])
def test_a_skipped_step_moves_nothing_and_is_not_counted(
    rule: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TaperNorm's warm-up ends at the fifth step applied, though the fifth one was skipped."""
    unchanged = _poison({1, 4}, monkeypatch)
    counted: list[int] = []
    real = Constraints.around

    def around(self: Constraints, step: int) -> Any:
        counted.append(step)
        return real(self, step)

    monkeypatch.setattr(Constraints, "around", around)
    config = tiny(rule, **RULES[rule])
    train(config)
    assert unchanged == [True, True]
    assert counted == list(range(1, 11))
    if rule == "tapernorm":
        model = AutoModelForCausalLM.from_pretrained(config.output.dir / "final")
        assert model.model.layers[0].attn_residual.pre.gate.item() == 0.0
        assert model.model.layers[0].attn_residual.pre.c.item() != 1.0


def test_the_rows_of_a_finished_model_are_unit(tiny: Tiny) -> None:
    config = tiny(**RULES["unit"])
    train(config)
    _assert_unit(AutoModelForCausalLM.from_pretrained(config.output.dir / "final"))


RANKS = """
import json, sys
import torch
from llmnorm import build_config, build_model
from llmnorm.training.engines import choose_engine
from llmnorm.training.objective import Objective
from llmnorm.training.precision import Precision

engine = choose_engine()
shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24}
norm = {"op": "tapernorm", "warmup_steps": 2, "taper_steps": 2}
config = build_config(
    {**shape, "num_hidden_layers": 1, "num_attention_heads": 2}, norm=norm, weights="unit"
)
model = build_model(config, seed=0).train()
precision = Precision(name="fp32", device_type="cpu", reason="test")
trained = [p for p in model.parameters() if p.requires_grad]
engine.prepare(Objective(model), lambda m: torch.optim.AdamW(trained, lr=0.01), precision)
generator = torch.Generator().manual_seed(engine.ranks.rank)  # each rank has its own data
for step in (1, 2, 3):
    ids = torch.randint(32, (2, 9), generator=generator)
    total = engine.backward([{"input_ids": ids, "targets": ids}], 36.0)
    engine.clip_and_step(total, 36.0, factor=1.0, max_norm=1.0, step=step)
pre = model.model.layers[0].attn_residual.pre
print("RESULT", json.dumps({
    "all": [p.double().sum().item() for p in model.parameters()],
    "gate": pre.gate.item(), "c": pre.c.item(),
    "rows": model.lm_head.weight.norm(dim=1).tolist(),
}))
engine.finish(None)
"""


def test_two_ranks_with_other_data_move_alike(tmp_path: Path, run_ranks: RunRanks) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    outputs = run_ranks(script)
    found = [json.loads(text.partition("RESULT ")[2].splitlines()[0]) for text in outputs]
    assert found[0] == found[1]
    assert found[0]["gate"] == pytest.approx(0.5)
    assert found[0]["c"] != 1.0
    assert found[0]["rows"] == pytest.approx([1.0] * 32)
