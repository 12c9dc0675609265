"""Lines, bars and silence on stderr."""

import io
import logging
import os
import sys
import warnings
from argparse import Namespace

import pytest

from saesteer.cli.progress import Bars, Lines, Report, Stage, reporting


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines_of(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def test_lines_at_the_start_every_five_seconds_and_at_the_end() -> None:
    stream, clock = io.StringIO(), Clock()
    report = Lines(stream, clock)
    for second in range(13):
        clock.now = 100.0 + second
        report("harvest", 100 * second, 1200, "tokens")
    assert lines_of(stream) == [
        "harvest: 1,200 tokens",
        "harvest: 500 tokens (42%), 100 tokens/s, 7.0 s left",
        "harvest: 1,000 tokens (83%), 100 tokens/s, 2.0 s left",
        "harvest: done, 1,200 tokens in 12.0 s, 100 tokens/s",
    ]
    assert report.rate("harvest") == pytest.approx(100)
    assert report.seconds["harvest"] == 12
    assert report.rate("another") is None


def test_a_note_says_more_after_its_comma() -> None:
    stream, clock = io.StringIO(), Clock()
    report = Lines(stream, clock)
    report("train", 0, 10, "tokens")
    clock.now += 6
    report("train", 6, 10, "tokens, FVU 0.310")
    assert lines_of(stream)[1] == "train: 6 tokens (60%), 1.0 tokens/s, 4.0 s left, FVU 0.310"


def test_the_rate_leaves_out_what_was_there_before() -> None:
    stream, clock = io.StringIO(), Clock()
    report = Lines(stream, clock)
    report("harvest", 1000, 1100, "tokens")
    clock.now += 10
    report("harvest", 1100, 1100, "tokens")
    assert lines_of(stream) == [
        "harvest: 1,100 tokens from 1,000",
        "harvest: done, 1,100 tokens in 10.0 s, 10 tokens/s",
    ]


def test_a_rate_below_one_a_second_is_shown_as_seconds_each() -> None:
    stage = Stage("find", began=0.0, first=0, done=1, total=9, unit="settings")
    assert stage.speed(4.0) == ", 4.0 s each"
    assert stage.speed(150.0) == ", 2 min 30 s each"
    assert stage.speed(0.5) == ", 2.0 settings/s"


def test_a_new_stage_ends_the_one_before() -> None:
    stream = io.StringIO()
    report = Lines(stream, Clock())
    report("replies", 0, 10, "new tokens")
    report("harvest", 0, 5, "tokens")
    report.close()
    report.close()
    assert lines_of(stream) == [
        "replies: 10 new tokens",
        "replies: ended, 0 new tokens in 0.0 s",
        "harvest: 5 tokens",
        "harvest: ended, 0 tokens in 0.0 s",
    ]


def test_saying_twice_that_it_is_done_says_it_once() -> None:
    stream = io.StringIO()
    report = Lines(stream, Clock())
    for _ in range(2):
        report("read", 0, 4, "samples")
        report("read", 4, 4, "samples")
        report("read", 4, 4, "samples")
    assert len(lines_of(stream)) == 4  # the stage ran twice


def test_bars_show_rate_and_time_left() -> None:
    from rich.console import Console

    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=True, width=120)
    report = Bars(stream, clock, console)
    report("harvest", 0, 1000, "tokens")
    clock.now += 2
    report("harvest", 500, 1000, "tokens, more")
    report._bars.refresh()
    report.say("loading [model]")
    report.warn("look\nout")
    report("harvest", 1000, 1000, "tokens")
    report.close()
    text = stream.getvalue()
    assert "500 tokens, 250 tokens/s, 2.0 s left, more" in text
    assert "1,000 tokens in 2.0 s, 500 tokens/s" in text
    assert "loading [model]" in text  # brackets are no markup
    assert "warning: look out" in text


def test_quiet_says_nothing_but_warnings() -> None:
    stream = io.StringIO()
    report = Report(stream, Clock())
    report("harvest", 0, 5, "tokens")
    report.say("loading")
    report("harvest", 5, 5, "tokens")
    report.warn("the corpus\nended")
    assert stream.getvalue() == "warning: the corpus ended\n"


def work() -> None:
    """What libraries do while a verb works."""
    print("printed by a library")
    warnings.warn("a warning", stacklevel=1)
    logging.getLogger("transformers.models").warning("logged by transformers")
    logging.getLogger("some.library").warning("logged elsewhere")
    logging.getLogger("saesteer.sae").warning("logged by us")


def test_libraries_are_quiet_and_stdout_is_kept_free(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting(Namespace(quiet=False, verbose=False)) as report:
        assert type(report) is Lines
        work()
    print("the result")
    captured = capsys.readouterr()
    assert captured.out == "the result\n"
    assert captured.err == "printed by a library\nwarning: logged by us\n"
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"


def test_verbose_lets_libraries_speak(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match="a warning"):
        with reporting(Namespace(quiet=True, verbose=True)) as report:
            assert type(report) is Report
            work()
    assert "warning: logged by us" in capsys.readouterr().err


def test_without_it_warnings_stay_away(recwarn: pytest.WarningsRecorder) -> None:
    with reporting(Namespace(quiet=True, verbose=False)):
        work()
    assert not recwarn.list


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with reporting(Namespace(quiet=False, verbose=False)) as report:
        assert type(report) is Bars
    monkeypatch.setenv("TERM", "dumb")
    with reporting(Namespace(quiet=False, verbose=False)) as report:
        assert type(report) is Lines


def test_a_long_step_is_not_silent() -> None:
    stream, clock = io.StringIO(), Clock()
    report = Lines(stream, clock)
    report.say("loading gemma")
    for _ in range(20):
        clock.now += 1
        report.beat()
    report("rank: plain replies", 0, 64, "replies")
    for _ in range(8):
        clock.now += 1
        report.beat()
    report("rank: plain replies", 32, 64, "replies")
    clock.now += 9
    report.beat()
    report("rank: plain replies", 64, 64, "replies")
    assert lines_of(stream) == [
        "loading gemma",
        "still at loading gemma: for 9.0 s",
        "still at loading gemma: for 18.0 s",
        "rank: plain replies: 64 replies",
        "rank: plain replies: 32 replies (50%), 4.0 replies/s, 8.0 s left",
        "still at rank: plain replies: 32 of 64 replies for 17.0 s",
        "rank: plain replies: done, 64 replies in 17.0 s, 3.8 replies/s",
    ]
