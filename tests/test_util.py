"""A block that may never end has a time limit."""

import signal
import threading

import pytest

from layerprune.errors import UsageError
from layerprune.util import time_limit


def spin():
    while True:
        pass


def test_a_block_that_does_not_end_is_left_with_its_name():
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(UsageError) as raised, time_limit(0.05, "the template"):
        spin()
    assert str(raised.value) == "the template has not ended after 0.05 s"
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_block_that_ends_is_left_alone_whatever_it_raises():
    with time_limit(60, "nothing"):
        pass
    with pytest.raises(KeyError), time_limit(60, "nothing"):
        raise KeyError("x")
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_alarm_of_somebody_else_is_not_taken():
    signal.setitimer(signal.ITIMER_REAL, 60)
    try:
        with time_limit(0.001, "nothing"):
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def test_in_another_thread_there_is_no_signal_to_wait_for():
    ended = []

    def work():
        with time_limit(0.001, "nothing"):
            ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [True]
