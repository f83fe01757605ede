"""DeepSpeed's settings: filled from the run file, contradictions named; which optimizers fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmnorm.errors import ConfigError, EnvironmentProblem
from llmnorm.training.engines import choose_engine
from llmnorm.training.engines.deepspeed_config import Promises, fill_settings, read_settings
from llmnorm.training.engines.deepspeed_optimizer import ShardedMuon, for_shards
from llmnorm.training.muon import MuonWithAdamW
from llmnorm.training.precision import Precision

pytestmark = pytest.mark.fast

FP32 = Precision(name="fp32", device_type="cpu", reason="")
BF16 = Precision(name="bf16", device_type="cpu", reason="")
SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "deepspeed"


def read(tmp_path: Path, **settings: Any) -> Any:
    """Read a user's own file."""
    file = tmp_path / "own.json"
    settings.setdefault("zero_optimization", {"stage": 2})
    file.write_text(json.dumps(settings))
    return read_settings({"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})


def fill(settings: Any, precision: Precision = FP32) -> dict[str, Any]:
    """Complete what `read` returned."""
    given, promises = settings
    return fill_settings(given, promises.source, precision, world=2, hidden_size=32)


def has_auto(value: Any) -> bool:
    """Whether `auto` is left anywhere."""
    if isinstance(value, dict):
        return any(map(has_auto, value.values()))
    return value == "auto"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_shipped_file_and_a_bare_stage_are_filled_alike(stage: int) -> None:
    file = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(SHIPPED / f"zero{stage}.json")}
    for precision in (FP32, BF16):
        shipped = fill(read_settings(file), precision)
        bare = fill(read_settings({"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}), precision)
        for settings in (shipped, bare):
            assert not has_auto(settings)
            assert settings["zero_optimization"]["stage"] == stage
            autocast = settings["torch_autocast"]
            assert autocast["enabled"] == (precision is BF16)
            assert autocast["lower_precision_safe_modules"] == []
        assert shipped.keys() == bare.keys()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"optimizer": {"type": "AdamW"}}, "optimizer is refused: the optimizer is the run file's"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is refused"),
        ({"gradient_cliping": 1.0}, "did you mean gradient_clipping"),
        ({"zero_optimization": {"stage": 0}}, "stage is 0; expected 1, 2 or 3"),
        ({"zero_optimization": 2}, "stage is 2; expected 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "stagee": 1}}, r"zero_optimization\.stagee is refused"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "offload_optimizer is refused",
        ),
        ({"train_batch_size": "big"}, "train_batch_size is 'big'; expected a number or auto"),
    ],
)
def test_settings_that_would_train_another_way_are_refused_by_name(
    settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=named) as raised:
        read(tmp_path, **settings)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "precision", "named"),
    [
        ({"fp16": {"enabled": True}}, FP32, "fp16 is refused"),
        ({"bf16": {"enabled": True}}, FP32, r"bf16\.enabled is true, but training\.precision"),
        ({"torch_autocast": {"enabled": True}}, FP32, r"torch_autocast\.enabled is true"),
        ({"torch_autocast": {"enabled": False}}, BF16, r"torch_autocast\.enabled is false"),
    ],
)
def test_a_precision_that_is_not_the_run_files_is_refused(
    settings: dict[str, Any], precision: Precision, named: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=named):
        fill(read(tmp_path, **settings), precision)


def test_deepspeeds_own_bfloat16_is_taken_when_asked_for_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = fill(read(tmp_path, bf16={"enabled": True, "check_grad_overflow": False}), BF16)
    assert settings["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert "torch_autocast" not in settings
    assert "losses are not those of other engines" in caplog.text


@pytest.mark.parametrize(
    ("key", "seen", "named"),
    [
        ("train_batch_size", 5, r"training\.global_batch_size"),
        ("train_micro_batch_size_per_gpu", 2, r"training\.micro_batch_size"),
        ("gradient_accumulation_steps", 2, "micro-batches of a step"),
        ("gradient_clipping", 1.0, r"training\.clip_norm"),
    ],
)
def test_batch_and_clipping_of_a_users_file_must_be_the_run_files(
    key: str, seen: float, named: str, tmp_path: Path
) -> None:
    given, promises = read(tmp_path, **{key: 4})
    assert key not in given
    promises.check({key: 4})
    with pytest.raises(ConfigError, match=rf"{key} is 4, but .* makes it {seen:g} .*{named}"):
        promises.check({key: seen})
    assert read(tmp_path, **{key: "auto"})[1].values == {}


def test_what_the_launcher_repeats_is_a_promise_too() -> None:
    variables = {
        "ACCELERATE_GRADIENT_CLIPPING": "0.5",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "3",
    }
    expected = {"gradient_clipping": 0.5, "gradient_accumulation_steps": 3}
    assert read_settings(variables)[1] == Promises(source="the launcher", values=expected)


def test_use_cpu_which_would_silently_run_ddp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(EnvironmentProblem, match="DeepSpeed and use_cpu at once"):
        choose_engine()


def parameters() -> list[nn.Parameter]:
    """A matrix and a vector."""
    return [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3))]


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "RMSprop", "NAdam"])
def test_an_elementwise_optimizer_is_taken(kind: str) -> None:
    optimizer = getattr(torch.optim, kind)(parameters(), lr=0.01)
    assert for_shards(optimizer) is optimizer
    assert not optimizer.state


class Normalized(torch.optim.SGD):
    """Divides each tensor's gradient by its length: shape does not matter, yet borders do."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad.div_(parameter.grad.norm())
        super().step()


@pytest.mark.parametrize(
    "optimizer",
    [torch.optim.Adafactor(parameters(), lr=0.01), Normalized(parameters(), lr=0.01)],
    ids=["factored", "normalized"],
)
def test_an_optimizer_of_whole_tensors_is_refused(optimizer: torch.optim.Optimizer) -> None:
    with pytest.raises(ConfigError, match="steps a matrix as a whole, but ZeRO"):
        for_shards(optimizer)


def test_adagrad_which_loses_its_groups_is_refused() -> None:
    with pytest.raises(ConfigError, match="rebuilds Adagrad without its parameter groups"):
        for_shards(torch.optim.Adagrad(parameters()))


def test_muon_beside_adamw_becomes_one_for_shards() -> None:
    matrix, vector = parameters()
    pair = MuonWithAdamW(torch.optim.Muon([matrix]), torch.optim.AdamW([vector]))
    optimizer = for_shards(pair)
    assert isinstance(optimizer, ShardedMuon)
    assert optimizer.param_groups == pair.param_groups
