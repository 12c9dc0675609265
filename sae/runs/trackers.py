"""A training's log in an experiment tracker as well: trackio, wandb or TensorBoard.

`metrics.jsonl` and `training.html` are written whatever is chosen here. A tracker that fails stops
no training: it is warned of once and left alone from then on.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from saesteer.checkpoints.errors import UserError, none_of

PACKAGES = {"trackio": "trackio", "wandb": "wandb", "tensorboard": "tensorboard"}
"""Trackers by the value of `log_to`, and the package of each, which is an extra of its name."""

PROJECT = "saesteer"


class Tracker(Protocol):
    """One run in a tracker."""

    def log(self, row: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def check_tracker(log_to: str) -> None:
    """Raise UsageError for an unknown tracker, UserError for one whose package is missing."""
    if log_to == "none":
        return
    if log_to not in PACKAGES:
        raise none_of("`log_to`", ("none", *PACKAGES), log_to)
    if importlib.util.find_spec(PACKAGES[log_to]) is None:
        raise UserError(
            f"`log_to` {log_to} needs the package {PACKAGES[log_to]}, which is not installed: "
            f"pip install 'saesteer[{log_to}]'"
        )


def open_tracker(
    log_to: str, folder: Path, settings: Mapping[str, Any], warn: Callable[[str], None]
) -> "SafeTracker | None":
    """The run of a training in a tracker; None for "none".

    Args:
        folder: of the training: its name is the run's, and its resolved path identifies the run, so
            that a training that is resumed goes on in the run it began.
        settings: shown as the run's configuration.
    """
    check_tracker(log_to)
    if log_to == "none":
        return None
    return SafeTracker(log_to, lambda: _OPEN[log_to](folder, settings), warn)


class SafeTracker:
    """A tracker that is opened at its first row and never stops the training."""

    def __init__(
        self, name: str, opens: Callable[[], Tracker], warn: Callable[[str], None]
    ) -> None:
        self._name, self._opens, self._warn = name, opens, warn
        self._tracker: Tracker | None = None
        self._failed = False

    def log(self, row: Mapping[str, Any], step: int, prefix: str = "") -> None:
        """Log the numbers of a row; `prefix` tells the SAEs of one training apart."""
        numbers = {
            f"{prefix}{name}": float(value)
            for name, value in row.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
        }

        def write() -> None:
            if self._tracker is None:
                self._tracker = self._opens()
            self._tracker.log(numbers, step)

        self._try(write)

    def close(self) -> None:
        """End the run, and send what is left."""
        if self._tracker is not None:
            self._try(self._tracker.close)

    def _try(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # another program's error: a broken server, a full disk
            self._failed = True
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            self._warn(f"{self._name} failed and is left alone; metrics.jsonl goes on: {reason}")


def _identity(folder: Path) -> str:
    import hashlib

    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]


class _TensorBoard:
    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Events of a training that was killed after its last state are written again.
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))
        text = "\n".join(f"- {name}: {value}" for name, value in settings.items())
        self._writer.add_text("settings", text)

    def log(self, row: Mapping[str, float], step: int) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=PROJECT,
            name=folder.name,
            id=_identity(folder),
            resume="allow",
            dir=str(folder),
            config=dict(settings),
            mode=wandb_mode(),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, row: Mapping[str, float], step: int) -> None:
        self._run.log(dict(row), step=step)

    def close(self) -> None:
        self._run.finish()


def wandb_mode() -> Any:
    """`WANDB_MODE` where it is set; else online with an account, and offline without one: asking
    for a key would hold up a training that nobody watches. `wandb sync` uploads it later."""
    if given := os.environ.get("WANDB_MODE"):
        return given
    import netrc

    if os.environ.get("WANDB_API_KEY"):
        return "online"
    try:
        known = netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        known = False
    return "online" if known else "offline"


class _Trackio:
    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import trackio

        self._run: Any = trackio.init(
            project=PROJECT,
            name=f"{folder.name}-{_identity(folder)}",
            config={name: str(value) for name, value in settings.items()},
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def log(self, row: Mapping[str, float], step: int) -> None:
        self._run.log(dict(row), step=step)

    def close(self) -> None:
        import trackio

        trackio.finish()


_OPEN: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "trackio": _Trackio,
    "wandb": _WandB,
}
