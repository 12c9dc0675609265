"""Progress on stderr: bars on a terminal, lines elsewhere, nothing with `--quiet`."""

import contextlib
import logging
import os
import sys
import threading
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, cast

from saesteer.cli.output import Stream, amount, duration, is_terminal, one_line, paint

if TYPE_CHECKING:
    from rich.console import Console

_SECONDS_BETWEEN_LINES = 5.0
_LONGEST_SILENCE = 9.0

# For libraries that are imported later; `quiet_libraries` sets the log levels of the others.
_QUIET_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true",  # unset, it warns when a process is forked
    "WANDB_MODE": "disabled",
}
_NOISY = (
    "transformers",
    "huggingface_hub",
    "datasets",
    "torch",
    "accelerate",
    "sae_lens",
    "transformer_lens",
    "httpx",
    "urllib3",
    "filelock",
    "fsspec",
    "py.warnings",
)


@dataclass
class Stage:
    """A stage of the work and how far it has come."""

    name: str
    began: float
    first: int
    done: int
    total: int
    unit: str
    extra: str = ""

    def rate(self, now: float) -> float | None:
        """Units per second since the stage began; None before the first one."""
        seconds, done = now - self.began, self.done - self.first
        return done / seconds if seconds > 0 and done > 0 else None

    def speed(self, now: float) -> str:
        """The rate for people, or nothing; below one a second the seconds that each takes."""
        rate = self.rate(now)
        if rate is None:
            return ""
        if rate < 1:
            return f", {duration(1 / rate)} each"
        return f", {rate:,.{0 if rate >= 10 else 1}f} {self.unit}/s"

    def left(self, now: float) -> str:
        """The time left for people, or nothing."""
        rate = self.rate(now)
        return "" if rate is None else f", {duration((self.total - self.done) / rate)} left"


class Report:
    """Keeps track of the stages of a verb and prints only warnings: the progress of `--quiet`.

    It is called as a `Progress`: `report(stage, done, total, note)`. The note is the unit, and
    after a comma anything else to show ("tokens, FVU 0.31").
    """

    def __init__(self, stream: Stream, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream = stream
        self.clock = clock
        self.stage: Stage | None = None
        self.finished: dict[str, Stage] = {}
        """Stages that ended, by name, with their end in `seconds`."""
        self.seconds: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int, note: str) -> None:
        unit, _, extra = note.partition(", ")
        ended = self.finished.get(stage)
        if self.stage is None and ended is not None and done >= ended.total == total:
            return  # the end of this stage was reported before
        now = self.clock()
        current = self.stage
        if current is None or current.name != stage or done < current.done:
            self.end()
            current = self.stage = Stage(stage, now, done, done, total, unit, extra)
            self.on_start(current)
        current.done, current.total, current.extra = done, total, extra
        if done >= total:
            self.end()
        else:
            self.on_move(current, now)

    def end(self) -> None:
        """End the present stage, whether or not it reached its total."""
        if self.stage is not None:
            stage, self.stage = self.stage, None
            self.finished[stage.name] = stage
            self.seconds[stage.name] = self.clock() - stage.began
            self.on_end(stage, self.seconds[stage.name])

    def rate(self, stage: str) -> float | None:
        """Units per second of a stage that ended; None where nothing was done."""
        ended = self.finished.get(stage)
        return None if ended is None else ended.rate(ended.began + self.seconds[stage])

    def say(self, text: str) -> None:
        """Show one line about a step without a known length."""

    def warn(self, text: str) -> None:
        """Show a warning, also with `--quiet`."""
        print(f"{paint('warning:', 'bold', self.stream)} {one_line(text)}", file=self.stream)

    def beat(self) -> None:
        """Show that the work goes on, if nothing has been shown for a while; called now and then
        from another thread."""

    def on_start(self, stage: Stage) -> None:
        """A stage has started."""

    def on_move(self, stage: Stage, now: float) -> None:
        """The present stage has moved; `now` is the time."""

    def on_end(self, stage: Stage, seconds: float) -> None:
        """A stage has ended after so many seconds."""

    def close(self) -> None:
        """End the present stage; nothing is shown afterwards."""
        self.end()


class Lines(Report):
    """A line when a stage starts, every few seconds, and when it ends; and after a while in which
    nothing moved, what is being waited for."""

    _beating = "still at "
    _doing = ""
    """The last line shown."""
    _since = 0.0

    def __init__(self, stream: Stream, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream, clock)
        self._shown = clock()

    def on_start(self, stage: Stage) -> None:
        from_where = f" from {amount(stage.first)}" if stage.first else ""
        self.say(f"{stage.name}: {amount(stage.total)} {stage.unit}{from_where}")
        self._last = stage.began

    def on_move(self, stage: Stage, now: float) -> None:
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        share = f"{stage.done / stage.total:.0%}"
        extra = f", {stage.extra}" if stage.extra else ""
        self.say(
            f"{stage.name}: {amount(stage.done)} {stage.unit} ({share}){stage.speed(now)}"
            f"{stage.left(now)}{extra}"
        )

    def on_end(self, stage: Stage, seconds: float) -> None:
        extra = f", {stage.extra}" if stage.extra else ""
        word = "done" if stage.done >= stage.total else "ended"
        self.say(
            f"{stage.name}: {word}, {amount(stage.done)} {stage.unit} in {duration(seconds)}"
            f"{stage.speed(stage.began + seconds)}{extra}"
        )

    def say(self, text: str) -> None:
        print(text, file=self.stream, flush=True)
        if not text.startswith(self._beating):
            self._doing, self._since = text, self.clock()
        self._shown = self.clock()

    def beat(self) -> None:
        now, stage = self.clock(), self.stage
        if now - self._shown < _LONGEST_SILENCE:
            return
        if stage is not None:
            self.say(
                f"{self._beating}{stage.name}: {amount(stage.done)} of {amount(stage.total)} "
                f"{stage.unit} for {duration(now - stage.began)}"
            )
        elif self._doing:
            self.say(f"{self._beating}{self._doing}: for {duration(now - self._since)}")


class Bars(Report):
    """One rich progress bar for each stage, with rate and time left."""

    def __init__(
        self,
        stream: Stream,
        clock: Callable[[], float] = time.monotonic,
        console: "Console | None" = None,
    ) -> None:
        super().__init__(stream, clock)
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskID, TextColumn
        from rich.table import Column

        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=16),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[info]}", markup=False, table_column=Column(no_wrap=True)),
            console=console or Console(file=cast(IO[str], stream)),
            # Results go to stdout; a bar must not overwrite them.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task: TaskID | None = None
        self._bars.start()

    def on_start(self, stage: Stage) -> None:
        self._task = self._bars.add_task(
            stage.name, total=stage.total, completed=stage.done, info=f"0 {stage.unit}"
        )

    def on_move(self, stage: Stage, now: float) -> None:
        extra = f", {stage.extra}" if stage.extra else ""
        self._show(
            stage,
            f"{amount(stage.done)} {stage.unit}{stage.speed(now)}{stage.left(now)}{extra}",
        )

    def on_end(self, stage: Stage, seconds: float) -> None:
        extra = f", {stage.extra}" if stage.extra else ""
        self._show(
            stage,
            f"{amount(stage.done)} {stage.unit} in {duration(seconds)}"
            f"{stage.speed(stage.began + seconds)}{extra}",
        )
        if self._task is not None:
            self._bars.stop_task(self._task)

    def _show(self, stage: Stage, info: str) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=stage.done, total=stage.total, info=info)

    def say(self, text: str) -> None:
        self._bars.console.print(text, markup=False, highlight=False)

    def warn(self, text: str) -> None:
        self._bars.console.print(f"warning: {one_line(text)}", markup=False, highlight=False)

    def close(self) -> None:
        super().close()
        self._bars.stop()


@contextlib.contextmanager
def reporting(args: Namespace) -> Iterator[Report]:
    """Show progress while the block runs, keep stdout for results, and silence libraries."""
    stream = sys.stderr
    if args.quiet:
        report = Report(stream)
    elif is_terminal(stream):
        report = Bars(stream)
    else:
        report = Lines(stream)
    with contextlib.ExitStack() as stack:
        stack.callback(report.close)
        # Libraries may print: stdout has to hold the result and nothing else.
        stack.enter_context(contextlib.redirect_stdout(stream))
        if getattr(args, "log_to", None) == "wandb":
            from saesteer.sae.runs.trackers import wandb_mode

            os.environ["WANDB_MODE"] = wandb_mode()  # before it is disabled for all others
        if not args.verbose:
            stack.enter_context(quiet_libraries())
        stack.enter_context(_our_log(report, args.verbose))
        stack.enter_context(_heart(report))
        yield report


@contextlib.contextmanager
def _heart(report: Report) -> Iterator[None]:
    """Let a report show that the work goes on, also within one long step."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(1.0):
            with contextlib.suppress(ValueError, OSError):  # the stream was closed
                report.beat()

    thread = threading.Thread(target=beat, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the warnings, log lines and bars of other libraries off stderr."""
    for name, value in _QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    silent = logging.NullHandler()  # without any handler Python prints warnings by itself
    logging.getLogger().addHandler(silent)
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger().removeHandler(silent)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _Forward(logging.Handler):
    """Hands log records to a report."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self._report.warn(record.getMessage())
        else:
            self._report.say(one_line(record.getMessage()))


@contextlib.contextmanager
def _our_log(report: Report, verbose: bool) -> Iterator[None]:
    """Show log records of saesteer: warnings, and with `--verbose` all others."""
    logger, handler = logging.getLogger("saesteer"), _Forward(report)
    level, passes_on = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = passes_on
