"""Notice a value that jumps above what the last steps were like.

Nothing is done about a spike but to say so: which steps count is decided in `soundness.py`.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

_SMALLEST = 1e-3
"""A standard deviation below this part of the mean counts as this part: flat curves have no
spikes."""


@dataclass(frozen=True, kw_only=True)
class Spike:
    """The first step of a spike.

    Args:
        value: what was seen.
        mean: of the window (the geometric mean of a logarithmic one).
        sigmas: how far the value lies above the mean, in standard deviations of the window.
        steps: how many values the window held.
    """

    value: float
    mean: float
    sigmas: float
    steps: int


class SpikeDetector:
    """Compares each value with the mean and standard deviation of a window of earlier ones.

        spike  <=>  value > mean + sigma * max(std, |mean| / 1000)

    Only sound values enter the window: none that is not finite, none of a spike. It judges from
    half a window on. A spike is reported at its first step; one that lasts for half a window is
    the new level, and the window begins again.

    Args:
        window: most values held.
        sigma: threshold in standard deviations; 0 reports nothing.
        logarithmic: judge the logarithm, for positive values that vary by factors.
    """

    def __init__(self, *, window: int, sigma: float, logarithmic: bool) -> None:
        self.sigma = sigma
        self.logarithmic = logarithmic
        self._window: deque[float] = deque(maxlen=window)
        self._enough = max(2, window // 2)
        self._above = 0  # steps that the spike under way has lasted

    def look(self, value: float) -> Spike | None:
        """Take the next step's value; return the spike that it begins, if it does."""
        if self.sigma == 0 or not math.isfinite(value) or (self.logarithmic and value <= 0):
            return None
        level = math.log(value) if self.logarithmic else value
        if len(self._window) < self._enough:
            self._window.append(level)
            return None
        mean, deviation = self._moments()
        sigmas = (level - mean) / deviation
        if sigmas <= self.sigma:
            self._window.append(level)
            self._above = 0
            return None
        self._above += 1
        if self._above >= self._enough:
            self._window.clear()
        if self._above > 1:
            return None
        mean = math.exp(mean) if self.logarithmic else mean
        return Spike(value=value, mean=mean, sigmas=sigmas, steps=len(self._window))

    def _moments(self) -> tuple[float, float]:
        count = len(self._window)
        mean = math.fsum(self._window) / count
        variance = math.fsum((level - mean) ** 2 for level in self._window) / (count - 1)
        smallest = _SMALLEST if self.logarithmic else _SMALLEST * abs(mean)
        return mean, max(math.sqrt(variance), smallest, math.ulp(1.0))

    def state(self) -> dict[str, Any]:
        """Return the window as JSON; floats read back equal."""
        return {"window": list(self._window), "above": self._above}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; a shorter window keeps the newest values."""
        self._window.clear()
        self._window.extend(state["window"])
        self._above = state["above"]
