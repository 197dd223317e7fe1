"""The first signal asks, the second ends; afterwards all is as it was."""

import os
import signal
import threading

import pytest

from expertly.errors import Stopped
from expertly.train.stop import Stop


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_first_asks_the_second_ends(signum):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with Stop() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signum)
        assert stop.asked
        assert stop.signum == signum
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.value.signum == signal.SIGTERM, "of the one that ended it"
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


def test_items_end_when_asked():
    seen = []
    with Stop() as stop:
        for item in stop.until(range(10)):
            seen.append(item)
            if item == 3:
                os.kill(os.getpid(), signal.SIGTERM)
    assert seen == [0, 1, 2, 3]
    assert list(Stop().until(range(3))) == [0, 1, 2]


def test_the_handlers_are_put_back_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError, match="no"), Stop():
        raise ValueError("no")
    assert signal.getsignal(signal.SIGTERM) == before


def test_another_thread_hears_nothing_and_trains_on():
    asked = []

    def work():
        with Stop() as stop:
            asked.append(stop.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked == [False]
