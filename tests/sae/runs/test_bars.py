"""The bars of calls from Python: one a stage, ended when the next begins."""

import io
from typing import Any

import pytest

from saesteer.sae.runs import bars
from saesteer.sae.runs.bars import Bars


class Kept:
    """Stands for tqdm's bar."""

    made: list["Kept"] = []

    def __init__(self, *, total: int, initial: int, desc: str, **rest: Any) -> None:
        self.total, self.n, self.desc, self.open, self.said = total, initial, desc, True, ""
        self.rest = rest
        Kept.made.append(self)

    def update(self, by: int) -> None:
        self.n += by

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        self.said = text

    def close(self) -> None:
        self.open = False


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Kept]:
    import tqdm.auto

    Kept.made = []
    monkeypatch.setattr(tqdm.auto, "tqdm", Kept)
    return Kept.made


def test_one_bar_a_stage(shown: list[Kept]) -> None:
    progress = Bars()
    for done in (0, 30, 100):
        progress("train", done, 100, "tokens, FVU 0.25")
    progress("train", 100, 100, "tokens")  # said twice, shown once
    progress("rank", 0, 5, "texts")
    progress("rank", 2, 5, "texts")
    progress("rank", 0, 7, "texts")  # the same stage, of the next call
    assert [(bar.desc, bar.n, bar.open) for bar in shown] == [
        ("train", 100, False), ("rank", 2, False), ("rank", 0, True)
    ]  # fmt: skip
    assert shown[0].said == "FVU 0.25" and shown[0].rest["unit"] == " tokens"


def test_a_stage_shorter_than_the_delay_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(bars, "DELAY", 3600.0)
    progress = Bars()
    for done in range(11):
        progress("train", done, 10, "tokens")
    assert stream.getvalue().strip() == ""
