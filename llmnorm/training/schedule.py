"""Learning-rate schedules as pure functions of the step.

A schedule maps a 0-based step to a factor between 0 and 1 that multiplies every group's learning
rate. It keeps no state, so a resumed run needs nothing but the step. Read `loop.py` next.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from llmnorm.errors import ConfigError

logger = logging.getLogger(__name__)


def _cosine(progress: float, final: float) -> float:
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def _linear(progress: float, final: float) -> float:
    return 1.0 - (1.0 - final) * progress


def _constant(progress: float, final: float) -> float:
    return 1.0


_DECAYS: dict[str, Callable[[float, float], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _linear,
    "constant": _constant,
}


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warm up linearly, hold, then decay to `final_lr_fraction` at the last step.

        factor(s) = (s + 1) / warmup_steps                  while s < warmup_steps
        factor(s) = decay((s + 1 - start) / decay_steps)    with start = horizon - decay_steps

    cosine and linear decay from the end of the warm-up, wsd over its last `decay_steps` (linearly),
    constant never. The last step of a decaying schedule runs at exactly `final_lr_fraction`.

    Args:
        name: cosine, linear, wsd or constant.
        horizon: number of steps of the run.
        warmup_steps: steps of linear warm-up, at most `horizon`.
        decay_steps: steps of the decay, at most `horizon - warmup_steps`.
        final_lr_fraction: factor of the last step.
    """

    name: str
    horizon: int
    warmup_steps: int
    decay_steps: int
    final_lr_fraction: float

    def __call__(self, step: int) -> float:
        """Return the factor of 0-based `step`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        into_decay = step + 1 - (self.horizon - self.decay_steps)
        if into_decay <= 0:
            return 1.0
        progress = min(1.0, into_decay / self.decay_steps)
        return _DECAYS[self.name](progress, self.final_lr_fraction)


def horizon_steps(max_steps: int | None, max_tokens: int | None, tokens_per_step: int) -> int:
    """Return the number of steps of a run: the earlier of both limits, in whole steps.

    Raises:
        ConfigError: if `max_tokens` is less than one step, or neither limit is given.
    """
    limits = [] if max_steps is None else [max_steps]
    if max_tokens is not None:
        limits.append(max_tokens // tokens_per_step)
    if not limits or min(limits) < 1:
        raise ConfigError(
            f"training.max_steps={max_steps}, training.max_tokens={max_tokens}: there is no "
            f"step (one is {tokens_per_step} tokens); raise the limit or lower global_batch_size"
        )
    return min(limits)


def _count(value: float, horizon: int) -> int:
    """Return a number of steps from a count or a fraction below 1."""
    return round(value * horizon) if 0 < value < 1 else int(value)


def make_schedule(
    name: str,
    *,
    horizon: int,
    warmup_steps: float,
    decay_steps: float | None = None,
    final_lr_fraction: float = 0.1,
) -> Schedule:
    """Return the schedule of a run; what does not fit into the run is shortened with a notice.

    Args:
        name: cosine, linear, wsd or constant.
        horizon: number of steps of the run.
        warmup_steps: a count, or a fraction of the run below 1.
        decay_steps: likewise, for wsd alone.
        final_lr_fraction: factor of the last step.

    Raises:
        ConfigError: if `name` is unknown.
    """
    if name not in _DECAYS:
        raise ConfigError(f"schedule.name={name!r} is unknown; one of {', '.join(_DECAYS)}")
    warmup = _count(warmup_steps, horizon)
    if warmup > horizon:
        logger.warning("warm-up of %d steps shortened to the run's %d steps", warmup, horizon)
        warmup = horizon
    decay = 0 if name == "constant" else horizon - warmup
    if name == "wsd":
        assert decay_steps is not None, "the run file gives wsd its decay"
        asked = _count(decay_steps, horizon)
        if asked > decay:
            logger.warning("decay of %d steps shortened to the %d after warm-up", asked, decay)
        decay = min(asked, decay)
    return Schedule(
        name=name,
        horizon=horizon,
        warmup_steps=warmup,
        decay_steps=decay,
        final_lr_fraction=final_lr_fraction,
    )
