"""Which arithmetic matrix products use: float32, or bfloat16 autocast over float32 weights.

`auto` asks the processor. On a GPU that has bfloat16 the answer is known; on a CPU it depends on
the chip, so a small forward and backward pass is timed in both. The first decision of a run is
kept when it resumes, or its losses would change with the machine's mood.
"""

import logging
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

logger = logging.getLogger(__name__)

_GAIN = 1.1
"""bfloat16 must be this many times faster: below, rounding is given away for noise."""
_MOST_TOKENS = 2048
_ROUNDS = 5

_PEAK_FLOPS = {
    "NVIDIA B200": 2.25e15,
    "NVIDIA H200": 9.89e14,
    "NVIDIA H100 80GB HBM3": 9.89e14,
    "NVIDIA A100-SXM4-40GB": 3.12e14,
    "NVIDIA A100-SXM4-80GB": 3.12e14,
    "NVIDIA A100-PCIE-40GB": 3.12e14,
    "NVIDIA A100 80GB PCIe": 3.12e14,
    "NVIDIA L40S": 3.62e14,
    "NVIDIA L40": 1.81e14,
    "NVIDIA GeForce RTX 4090": 1.65e14,
}
"""Dense bfloat16 peaks of the vendors' data sheets; variants (NVL, PCIe, D) have other peaks."""


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The arithmetic of a run.

    Args:
        name: fp32 or bf16.
        device_type: cpu or cuda.
        reason: why, in words, for environment.json.
    """

    name: str
    device_type: str
    reason: str

    @property
    def dtype(self) -> torch.dtype | None:
        """Type of autocast, None without."""
        return torch.bfloat16 if self.name == "bf16" else None

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which forwards run."""
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)


def decide_precision(
    requested: str, device: torch.device, *, hidden_size: int, tokens: int
) -> Precision:
    """Return the precision of a run on this processor.

    Args:
        requested: auto, fp32 or bf16.
        device: where the model runs.
        hidden_size: width of the model, for the measurement.
        tokens: tokens of a micro-batch, for the measurement.
    """
    if requested != "auto":
        return Precision(name=requested, device_type=device.type, reason="asked for")
    if device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        reason = "the GPU has bfloat16" if name == "bf16" else "the GPU has no bfloat16"
        return Precision(name=name, device_type=device.type, reason=reason)
    fp32, bf16 = _time_both(device, hidden_size, min(tokens, _MOST_TOKENS))
    name = "bf16" if fp32 > _GAIN * bf16 else "fp32"
    reason = f"measured {fp32 * 1e3:.2f} ms in fp32, {bf16 * 1e3:.2f} ms in bf16"
    logger.info("precision %s: %s", name, reason)
    return Precision(name=name, device_type=device.type, reason=reason)


def _time_both(device: torch.device, hidden_size: int, tokens: int) -> tuple[float, float]:
    """Return the median seconds of an mlp's forward and backward in fp32 and in bf16."""
    with torch.random.fork_rng(devices=[]):
        mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size),
            nn.SiLU(),
            nn.Linear(4 * hidden_size, hidden_size),
        ).to(device)
        x = torch.randn(tokens, hidden_size, device=device)
    times: dict[bool, list[float]] = {False: [], True: []}
    for round_ in range(_ROUNDS + 2):
        for enabled in (False, True):
            begun = time.perf_counter()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
                y = mlp(x).float().square().mean()
            y.backward()
            if round_ >= 2:
                times[enabled].append(time.perf_counter() - begun)
    return median(times[False]), median(times[True])


def peak_flops(device: torch.device, precision: Precision) -> tuple[float, str]:
    """Return operations per second that MFU is relative to, and where the number is from.

    A known GPU in bfloat16 has its data sheet's peak; anything else the rate of a large product
    measured here.
    """
    if device.type == "cuda" and precision.name == "bf16":
        name = torch.cuda.get_device_name(device)
        if name in _PEAK_FLOPS:
            return _PEAK_FLOPS[name], f"data sheet of {name}, dense bfloat16"
    size = 1024 if device.type == "cpu" else 8192
    seconds = _time_product(size, device, precision.dtype or torch.float32)
    return 2 * size**3 / seconds, f"measured product of {size} x {size} matrices"


def _time_product(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the least seconds of a product of two square matrices."""
    x = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(_ROUNDS):
        begun = time.perf_counter()
        (x @ x)[0, 0].item()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)
