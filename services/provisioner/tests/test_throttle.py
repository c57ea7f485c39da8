from provisioner.throttle import Throttle


def test_starts_are_limited_within_any_minute() -> None:
    throttle = Throttle(limit=2)
    assert throttle.seconds_until_free(0) == 0
    throttle.record_start(0)
    throttle.record_start(50)
    assert throttle.seconds_until_free(50) == 10
    assert throttle.seconds_until_free(60) == 0
    throttle.record_start(60)
    assert throttle.seconds_until_free(61) == 49


def test_the_last_minute_ends_with_the_last_start() -> None:
    throttle = Throttle(limit=2)
    assert throttle.seconds_until_empty(0) == 0
    throttle.record_start(0)
    throttle.record_start(30)
    assert throttle.seconds_until_empty(40) == 50
    assert throttle.seconds_until_empty(90) == 0
