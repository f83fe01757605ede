"""Learning from a teacher: the formula, and runs that do it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmnorm import LlmNormForCausalLM, build_config, build_model
from llmnorm.cli import run_command
from llmnorm.config import RunConfig
from llmnorm.data import Prepared
from llmnorm.errors import CheckpointError, ConfigError
from llmnorm.planning import command
from llmnorm.training.distillation import Distillation
from llmnorm.training.loop import train

from .conftest import Killed, metrics, numbers, stop_after, tiny_words
from .test_model_start import SHAPE, save_model

Tiny = Callable[..., RunConfig]
VOCABULARY = 64
WEIGHT, TEMPERATURE = 0.3, 2.5


def pair() -> tuple[LlmNormForCausalLM, LlmNormForCausalLM]:
    """A model and a teacher of another scheme, in float64."""
    models = [
        build_model(build_config(dict(SHAPE), vocab_size=VOCABULARY, norm=norm), seed=seed)
        for seed, norm in ((0, "dyt"), (1, "rmsnorm"))
    ]
    return models[0].double(), models[1].double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (3, 11), generator=generator)
    targets = torch.randint(VOCABULARY, (3, 11), generator=generator)
    targets[0, 4:] = -100
    return ids, targets


@pytest.mark.parametrize("logits_per_chunk", [2**20, 2 * VOCABULARY * 7])
def test_the_loss_mixes_cross_entropy_and_divergence_over_counted_targets(
    logits_per_chunk: int,
) -> None:
    model, teacher = pair()
    ids, targets = batch()
    how = {"weight": WEIGHT, "temperature": TEMPERATURE, "logits_per_chunk": logits_per_chunk}
    objective = Distillation(model, teacher, **how)
    loss_sum, count = objective(ids, targets)
    counted = targets >= 0
    z = model(input_ids=ids).logits[counted]
    u = teacher(input_ids=ids).logits[counted].detach()
    p, q = (torch.softmax(logits / TEMPERATURE, -1) for logits in (u, z))
    divergence = (p * (p.log() - q.log())).sum()
    ce = -torch.log_softmax(z, -1).gather(1, targets[counted][:, None]).sum()
    by_hand = (1 - WEIGHT) * ce + WEIGHT * TEMPERATURE**2 * divergence
    assert count.item() == counted.sum().item()
    torch.testing.assert_close(loss_sum, by_hand, rtol=1e-12, atol=0)
    gradients = [
        torch.autograd.grad(loss, list(model.parameters())) for loss in (loss_sum, by_hand)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert objective.take_parts(1) == pytest.approx(
        {"train/cross_entropy": ce.item(), "train/divergence": divergence.item()}, rel=1e-12
    )


def test_a_model_that_is_its_teacher_has_no_divergence_and_no_gradient() -> None:
    model, _ = pair()
    teacher, _ = pair()
    loss_sum, _ = Distillation(model, teacher, weight=1.0, temperature=1.0)(*batch())
    loss_sum.backward()
    assert abs(loss_sum.item()) < 1e-12
    assert max(p.grad.abs().max().item() for p in model.parameters()) < 1e-12


def test_the_teacher_is_no_part_of_what_is_trained_or_saved() -> None:
    model, teacher = pair()
    objective = Distillation(model.train(), teacher.train(), weight=1.0, temperature=1.0)
    assert set(objective.state_dict()) == {f"model.{name}" for name in model.state_dict()}
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    objective.train()
    assert not teacher.training


def test_only_the_last_forwards_of_a_step_count_as_parts() -> None:
    objective = Distillation(*pair(), weight=0.5, temperature=1.0)
    ids, targets = batch()
    for rows in (slice(0, 3), slice(0, 1), slice(1, 3)):  # an engine settles itself with the first
        objective(ids[rows], targets[rows])
    split = objective.take_parts(2)
    objective(ids, targets)
    assert objective.take_parts(1) == pytest.approx(split, rel=1e-12)


@pytest.fixture
def teacher(data: Prepared, tmp_path: Path) -> Path:
    return save_model(data, tmp_path / "teacher", norm="layernorm")


def test_a_continued_run_needs_the_same_teacher(
    tiny: Tiny, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, stopped = (tiny(name, distill__teacher=str(teacher)) for name in ("a", "b"))
    train(straight)
    stop_after(8, monkeypatch, Killed())
    with pytest.raises(Killed):
        train(stopped)
    weights = (teacher / "model.safetensors").read_bytes()
    changed = AutoModelForCausalLM.from_pretrained(teacher)
    changed.lm_head.weight.data[0, 0] += 1
    changed.save_pretrained(teacher)
    with pytest.raises(CheckpointError, match=r"began with other weights than distill\.teacher="):
        train(stopped)
    (teacher / "model.safetensors").write_bytes(weights)
    assert train(stopped) == 0
    assert numbers(stopped.output.dir) == numbers(straight.output.dir)
    facts = json.loads((stopped.output.dir / "environment.json").read_text())
    assert facts["distill.teacher"]["path"] == str(teacher)
    for record in metrics(straight.output.dir):
        assert record["train/loss"] == pytest.approx(record["train/divergence"], rel=1e-9)
        assert record["train/cross_entropy"] > record["train/loss"]


def test_a_teacher_of_another_vocabulary_is_refused(
    tiny: Tiny, data: Prepared, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"distill\.teacher: expected a finished run or"):
        tiny(distill__teacher=str(tmp_path))
    larger = build_model(build_config(dict(SHAPE), vocab_size=data.vocab_size + 1))
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(ConfigError, match=f"a vocabulary of {data.vocab_size + 1}, the model"):
        train(tiny(distill__teacher=str(tmp_path / "larger")))


def test_the_forecast_counts_the_teacher(
    teacher: Path, data: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tiny_words(data.path, tmp_path / "run", distill__teacher=str(teacher))
    assert run_command(command, "llmnorm validate", ["--json", *words]) == 0
    held = json.loads(capsys.readouterr().out)["memory"]["teacher"]
    model = AutoModelForCausalLM.from_pretrained(teacher)
    assert held == 4 * sum(parameter.numel() for parameter in model.parameters())
    (teacher / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"distill\.teacher=.* no \*\.safetensors"):
        run_command(command, "llmnorm validate", ["--json", *words])
