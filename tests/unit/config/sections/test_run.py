"""Time limits of phases."""

from marlhf_mega.config.sections.run import WatchdogConfig

LIMITS = WatchdogConfig(seconds=60, update_seconds=5)


def test_a_phase_without_a_limit_of_its_own_has_the_common_one():
    assert LIMITS.limit_of("update") == ("watchdog.update_seconds", 5)
    assert LIMITS.limit_of("rollout") == ("watchdog.seconds", 60)
    assert LIMITS.limit_of("between phases") == ("watchdog.seconds", 60)


def test_collectives_wait_longer_than_the_longest_phase():
    assert LIMITS.collective_seconds == 1860
    assert WatchdogConfig(rollout_seconds=7200).collective_seconds == 7260
    no_limit = WatchdogConfig(seconds=None, rollout_seconds=7200)
    assert no_limit.collective_seconds > 365 * 24 * 3600


def test_start_up_has_no_less_time_than_a_save():
    """It may read a checkpoint."""
    assert LIMITS.limit_of("start-up") == ("watchdog.seconds", 60)
    longer = WatchdogConfig(seconds=60, checkpoint_seconds=90)
    assert longer.limit_of("start-up") == ("watchdog.checkpoint_seconds", 90)
    shorter = WatchdogConfig(seconds=60, checkpoint_seconds=30)
    assert shorter.limit_of("start-up") == ("watchdog.seconds", 60)
    assert WatchdogConfig(seconds=None, checkpoint_seconds=30).limit_of("start-up")[1] is None
