"""The first Ctrl-C asks, the second one kills, and afterwards all is as before."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from saesteer.sae.runs.stopping import stop_requests


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """As in a terminal: a shell starts background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_becomes_a_question(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests() as stop:
        assert not stop()
        signal.raise_signal(number)
        assert stop() and stop()
    assert signal.getsignal(number) is before


def test_a_second_signal_is_obeyed_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        with stop_requests():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_return_after_an_error() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError), stop_requests():
        raise RuntimeError
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_may_ask_too() -> None:
    answers: list[bool] = []

    def work() -> None:
        with stop_requests() as stop:
            answers.append(stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_does_not_leave_in_time_is_interrupted(number: signal.Signals) -> None:
    """Also in the middle of a system call: here a read that nothing ever answers."""
    before = signal.getsignal(number)
    reading, _writing = os.pipe()

    def stop_here(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(number, stop_here)
    try:
        with pytest.raises(KeyboardInterrupt), stop_requests(grace_seconds=0.05) as stop:
            signal.raise_signal(number)
            assert stop()
            os.read(reading, 1)
    finally:
        signal.signal(number, before)
        os.close(reading)
        os.close(_writing)


def test_who_leaves_in_time_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    timers: list[threading.Timer] = []
    original = threading.Timer.start

    def start(timer: threading.Timer) -> None:
        timers.append(timer)
        original(timer)

    monkeypatch.setattr(threading.Timer, "start", start)
    with stop_requests() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop() and not timers[0].finished.is_set()
    timers[0].join()
    assert len(timers) == 1 and timers[0].finished.is_set(), "and it ended without a signal"
