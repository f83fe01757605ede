"""bfloat16 only where it pays, over float32 weights; compilation only where it works."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmnorm import build_config, build_model
from llmnorm.config import RunConfig
from llmnorm.training import compiling
from llmnorm.training.compiling import compile_blocks, decide_compile
from llmnorm.training.engines.plain import PlainEngine
from llmnorm.training.loop import train
from llmnorm.training.objective import Objective
from llmnorm.training.precision import Precision, decide_precision, peak_flops

from .conftest import metrics

CPU = torch.device("cpu")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("seconds", "name"), [((2.0, 1.0), "bf16"), ((1.0, 1.0), "fp32"), ((1.0, 3.0), "fp32")]
)
def test_auto_takes_bfloat16_when_measured_faster(
    seconds: tuple[float, float], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmnorm.training.precision._time_both", lambda *_: seconds)
    precision = decide_precision("auto", CPU, hidden_size=64, tokens=64)
    assert precision.name == name
    assert "measured" in precision.reason


@pytest.mark.fast
def test_measuring_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    decide_precision("auto", CPU, hidden_size=32, tokens=32)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.fast
def test_what_is_asked_for_is_taken_and_its_peak_known() -> None:
    for name, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
        precision = decide_precision(name, CPU, hidden_size=8, tokens=8)
        assert (precision.name, precision.dtype) == (name, dtype)
        with precision.autocast():
            assert torch.is_autocast_enabled("cpu") == (name == "bf16")
    flops, source = peak_flops(CPU, precision)
    assert flops > 1e8
    assert "measured" in source


@pytest.mark.fast
@pytest.mark.parametrize(
    ("gpu", "precision", "flops"),
    [
        ("NVIDIA L40S", "bf16", 3.62e14),
        ("NVIDIA L40", "bf16", 1.81e14),
        ("NVIDIA H200", "bf16", 9.89e14),
        ("NVIDIA H100 PCIe", "bf16", None),  # another peak than the SXM module's
        ("NVIDIA H200", "fp32", None),
    ],
)
def test_a_data_sheets_peak_is_used_for_its_own_gpu_and_precision_alone(
    gpu: str, precision: str, flops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: gpu)
    monkeypatch.setattr("llmnorm.training.precision._time_product", lambda *_: 1.0)
    chosen = Precision(name=precision, device_type="cuda", reason="test")
    peak, source = peak_flops(torch.device("cuda"), chosen)
    assert peak == (flops or 2 * 8192**3)
    assert ("measured" in source) == (flops is None)


def test_weights_moments_and_gradients_stay_float32_under_bfloat16(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, set[torch.dtype]] = {"grad": set(), "state": set()}
    real = PlainEngine.clip_and_step

    def clip_and_step(self: PlainEngine, *args: Any, **kwargs: Any) -> Any:
        seen["grad"] |= {p.grad.dtype for p in self.parameters.values()}
        result = real(self, *args, **kwargs)
        seen["state"] |= {p.tensor.dtype for p in self.pieces() if ":" not in p.slot}
        return result

    monkeypatch.setattr(PlainEngine, "clip_and_step", clip_and_step)
    bf16, fp32 = tiny("bf16", training__precision="bf16"), tiny("fp32")
    train(bf16)
    assert seen == {"grad": {torch.float32}, "state": {torch.float32}}
    train(fp32)
    left, right = metrics(bf16.output.dir), metrics(fp32.output.dir)
    assert left[0]["train/loss"] != right[0]["train/loss"]
    assert left[-1]["train/loss"] == pytest.approx(right[-1]["train/loss"], rel=2e-2)


@pytest.mark.fast
def test_auto_does_not_compile_on_a_cpu() -> None:
    assert decide_compile("auto", CPU) is False
    assert decide_compile(False, CPU) is False


@pytest.mark.fast
def test_a_missing_compiler_means_eager_with_one_notice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Python.h: No such file or directory\nmore")

    monkeypatch.setattr(torch, "compile", broken)
    with caplog.at_level("WARNING"):
        assert decide_compile(True, CPU) is False
    assert [record.getMessage() for record in caplog.records] == [
        "torch.compile does not work here, training runs eagerly: "
        "Python.h: No such file or directory"
    ]


# Dynamo reads .grad of the tensors it traces and then meets torch's own warning about it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_blocks_keep_names_and_losses(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = tiny("eager", training__max_steps=5)
    train(eager)
    real = torch.compile
    regions: list[object] = []

    def aot_eager(function: Any, **_: Any) -> Any:
        regions.append(function)
        return real(function, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", aot_eager)
    compiled = tiny("compiled", training__max_steps=5, training__compile=True)
    train(compiled)
    assert len(regions) == 1 + 2 + 1  # the trial, two layers, head with loss
    for one, other in zip(metrics(eager.output.dir), metrics(compiled.output.dir), strict=True):
        assert other["train/loss"] == pytest.approx(one["train/loss"], rel=1e-6)


@pytest.mark.fast
def test_compiling_leaves_state_dict_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: functools.partial(function))
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24}
    model = build_model(build_config({**shape, "num_hidden_layers": 1, "num_attention_heads": 2}))
    before = list(model.state_dict())
    compile_blocks(Objective(model))
    assert list(model.state_dict()) == before
    assert compiling.compiler_problem(CPU) is None
