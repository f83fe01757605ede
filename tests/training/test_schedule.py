"""Schedules against formulas written out by hand."""

import logging
import math

import pytest

from llmnorm.errors import ConfigError
from llmnorm.training.schedule import horizon_steps, make_schedule

pytestmark = pytest.mark.fast


def test_warmup_rises_linearly_to_the_peak_at_its_last_step() -> None:
    schedule = make_schedule("cosine", horizon=100, warmup_steps=10)
    assert [schedule(s) for s in range(10)] == [(s + 1) / 10 for s in range(10)]


def test_cosine_ends_at_the_final_fraction_and_is_halfway_in_the_middle() -> None:
    schedule = make_schedule("cosine", horizon=110, warmup_steps=10, final_lr_fraction=0.1)
    assert schedule(109) == pytest.approx(0.1, abs=1e-15)
    assert schedule(59) == pytest.approx(0.55, abs=1e-15)
    expected = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 25 / 100))
    assert schedule(34) == pytest.approx(expected, abs=1e-15)


def test_linear_falls_by_equal_steps_to_the_final_fraction() -> None:
    schedule = make_schedule("linear", horizon=20, warmup_steps=0, final_lr_fraction=0.0)
    assert [schedule(s) for s in range(20)] == pytest.approx([1 - (s + 1) / 20 for s in range(20)])


def test_wsd_holds_the_peak_and_decays_over_its_last_steps() -> None:
    schedule = make_schedule(
        "wsd", horizon=100, warmup_steps=10, decay_steps=0.2, final_lr_fraction=0.0
    )
    assert all(schedule(s) == 1.0 for s in range(9, 80))
    assert [schedule(s) for s in range(80, 100)] == pytest.approx(
        [1 - (k + 1) / 20 for k in range(20)]
    )


def test_constant_stays_at_the_peak_after_warmup() -> None:
    schedule = make_schedule("constant", horizon=50, warmup_steps=5)
    assert {schedule(s) for s in range(5, 50)} == {1.0}


def test_a_fraction_of_the_run_may_stand_for_warmup_steps() -> None:
    assert make_schedule("cosine", horizon=200, warmup_steps=0.05).warmup_steps == 10


def test_warmup_longer_than_the_run_is_shortened_with_a_notice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        schedule = make_schedule("cosine", horizon=8, warmup_steps=100)
    assert schedule.warmup_steps == 8
    assert schedule(7) == 1.0
    assert "shortened" in caplog.text


def test_wsd_decay_that_overlaps_warmup_is_shortened_with_a_notice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        schedule = make_schedule("wsd", horizon=10, warmup_steps=4, decay_steps=9)
    assert schedule.decay_steps == 6
    assert "shortened" in caplog.text


def test_the_earlier_limit_is_the_horizon() -> None:
    assert horizon_steps(10, 1_000_000, 100) == 10
    assert horizon_steps(10, 799, 100) == 7
    assert horizon_steps(None, 800, 100) == 8


def test_fewer_tokens_than_one_step_are_an_error() -> None:
    with pytest.raises(ConfigError, match="max_tokens=99"):
        horizon_steps(None, 99, 100)
