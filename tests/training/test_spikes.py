"""A spike is told once, from noise, and never becomes what others are judged by."""

import math
import random

import pytest

from llmnorm.training.spikes import SpikeDetector

pytestmark = pytest.mark.fast


def _noise(count: int, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [5 + 0.1 * rng.gauss(0, 1) for _ in range(count)]


def _seen(detector: SpikeDetector, values: list[float]) -> list[int]:
    return [number for number, value in enumerate(values) if detector.look(value) is not None]


def test_a_spike_is_told_at_its_first_step_and_by_how_much() -> None:
    detector = SpikeDetector(window=32, sigma=6, logarithmic=False)
    assert _seen(detector, [*_noise(40), 7.0, 7.5, 7.0, *_noise(5, 1)]) == [40]
    spike = detector.look(9.0)
    assert spike is not None
    assert (spike.value, spike.steps) == (9.0, 32)
    assert spike.mean == pytest.approx(5, abs=0.1)
    assert spike.sigmas == pytest.approx(4 / 0.1, rel=0.4)


def test_nothing_is_judged_before_half_a_window() -> None:
    detector = SpikeDetector(window=32, sigma=6, logarithmic=False)
    assert _seen(detector, [*_noise(15), 50.0]) == []


def test_what_is_not_finite_and_what_spikes_stay_out_of_the_window() -> None:
    clean = SpikeDetector(window=32, sigma=6, logarithmic=False)
    dirty = SpikeDetector(window=32, sigma=6, logarithmic=False)
    values = _noise(60)
    _seen(clean, values)
    _seen(dirty, [math.nan, math.inf, *values[:30], math.nan, 50.0, -math.inf, *values[30:]])
    assert dirty.state() == clean.state()


def test_a_level_that_stays_is_learned_anew() -> None:
    detector = SpikeDetector(window=16, sigma=6, logarithmic=False)
    higher = [value + 5 for value in _noise(40, 1)]
    assert _seen(detector, [*_noise(30), *higher, 20.0]) == [30, 70]


def test_a_logarithmic_window_judges_factors_and_passes_over_zero() -> None:
    detector = SpikeDetector(window=32, sigma=6, logarithmic=True)
    values = [math.exp(value) for value in _noise(40)]
    assert _seen(detector, [0.0, *values, 0.0, math.exp(6.5)]) == [42]


@pytest.mark.parametrize("level", [0.0, 3.0])
def test_a_flat_curve_has_no_spikes(level: float) -> None:
    detector = SpikeDetector(window=16, sigma=6, logarithmic=False)
    assert _seen(detector, [level] * 40 + [level * 1.005]) == []


def test_a_threshold_of_0_is_off() -> None:
    assert _seen(SpikeDetector(window=16, sigma=0, logarithmic=False), [1.0] * 30 + [9.0]) == []


def test_a_detector_continues_from_its_state() -> None:
    straight = SpikeDetector(window=16, sigma=2, logarithmic=False)
    other = SpikeDetector(window=16, sigma=2, logarithmic=False)
    values = _noise(200)
    expected = _seen(straight, values)
    first = _seen(other, values[:77])
    again = SpikeDetector(window=16, sigma=2, logarithmic=False)
    again.load_state(other.state())
    assert expected == first + [77 + number for number in _seen(again, values[77:])]
    assert again.state() == straight.state()
    assert expected
