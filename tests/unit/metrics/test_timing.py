import time

import pytest

from marlhf_mega.metrics.timing import PhaseTimers


def test_a_phase_entered_twice_is_added_up_and_draining_starts_again():
    timers = PhaseTimers()
    for _ in range(2):
        with timers("rollout"):
            time.sleep(0.02)
    with timers("update"):
        pass
    seconds = timers.drain()
    assert set(seconds) == {"time/rollout_seconds", "time/update_seconds"}
    assert 0.04 <= seconds["time/rollout_seconds"] < 0.4
    assert seconds["time/update_seconds"] < 0.02
    assert timers.drain() == {}


def test_phases_nest_and_the_outer_one_holds_the_inner():
    timers = PhaseTimers()
    with timers("step"), timers("rollout"):
        time.sleep(0.01)
    assert timers.seconds("step") >= timers.seconds("rollout") >= 0.01


def test_a_phase_that_raises_is_still_timed():
    timers = PhaseTimers()
    with pytest.raises(ZeroDivisionError), timers("update"):
        raise ZeroDivisionError
    assert timers.seconds("update") > 0


def test_the_device_is_waited_for_before_each_reading_of_the_clock():
    waits = []
    timers = PhaseTimers(lambda: waits.append("wait"))
    with timers("rollout"):
        assert waits == ["wait"]
    assert waits == ["wait", "wait"]


def test_an_observer_hears_of_the_innermost_phase():
    heard = []
    timers = PhaseTimers(observe=heard.append)
    with timers("step"):
        with timers("rollout"):
            pass
        with pytest.raises(ZeroDivisionError), timers("update"):
            raise ZeroDivisionError
    assert heard == ["step", "rollout", "step", "update", None]
