"""Which steps count: bad ones are skipped, counted and limited; spikes are reported (`spikes.py`).

A step is bad when its loss or gradient norm is not finite on some rank. The engine has then left
weights and moments untouched; here it is said, and the run ends after too many in a row.
"""

import logging
from collections.abc import Callable
from typing import Any

from llmnorm.config import FaultsSection
from llmnorm.errors import LlmNormError
from llmnorm.training.engines import StepResult
from llmnorm.training.spikes import SpikeDetector

logger = logging.getLogger(__name__)


class Diverged(LlmNormError):  # noqa: N818 (what happened to the run)
    """Loss or gradient was not finite for `faults.max_bad_steps` steps in a row."""

    exit_code = 6


class Soundness:
    """Counts bad steps and watches for spikes, the same on every rank.

    Args:
        faults: the limits of the run file.
    """

    def __init__(self, faults: FaultsSection) -> None:
        self.limit = faults.max_bad_steps
        self.skipped = 0  # steps not applied since the run began
        self.bad_in_a_row = 0
        window, sigma = faults.spike_window, faults.spike_sigma
        self._detectors = {
            "loss": SpikeDetector(window=window, sigma=sigma, logarithmic=False),
            "grad_norm": SpikeDetector(window=window, sigma=sigma, logarithmic=True),
        }

    def judge(self, step: int, result: StepResult) -> dict[str, float]:
        """Count a step's outcome and speak of what is wrong with it; return its metrics."""
        self.skipped += not result.applied
        self.bad_in_a_row = 0 if result.applied else self.bad_in_a_row + 1
        metrics: dict[str, float] = {"skipped_steps": self.skipped}
        if not result.applied:
            logger.warning(
                "step %d skipped: loss %s, gradient norm %s; weights and optimizer are unchanged",
                *(step, result.loss, result.grad_norm),
            )
            return metrics
        for name, detector in self._detectors.items():
            spike = detector.look(getattr(result, name))
            if spike is not None:
                metrics[f"spike/{name}"] = spike.sigmas
                logger.warning(
                    "step %d: %s %.4g is a spike, %.1f sigma above %.4g, the mean of %d steps",
                    *(step, name, spike.value, spike.sigmas, spike.mean, spike.steps),
                )
        return metrics

    def check(self, step: int, last_checkpoint: Callable[[], str]) -> None:
        """End the run after too many bad steps in a row.

        Args:
            step: completed steps.
            last_checkpoint: returns the newest one.

        Raises:
            Diverged: naming the last checkpoint.
        """
        if self.bad_in_a_row < self.limit:
            return
        raise Diverged(
            f"loss or gradient was not finite for {self.bad_in_a_row} steps in a row up to step "
            f"{step}; last checkpoint: {last_checkpoint()}; start again with a lower optimizer.lr "
            "in another output.dir"
        )

    def state(self) -> dict[str, Any]:
        """Return counters and windows as JSON, for the checkpoint."""
        return {
            "skipped_steps": self.skipped,
            "bad_in_a_row": self.bad_in_a_row,
            "spikes": {name: detector.state() for name, detector in self._detectors.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken."""
        self.skipped = state["skipped_steps"]
        self.bad_in_a_row = state["bad_in_a_row"]
        for name, detector in self._detectors.items():
            detector.load_state(state["spikes"][name])
