"""Batches made ahead are those made in turns; nothing hangs, whichever side stops first."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.sae.activations import prefetch as prefetch_module
from saesteer.sae.activations.batches import BatchStream
from saesteer.sae.activations.prefetch import BATCHES_AHEAD, Prefetch

CPU = torch.device("cpu")


class Numbers:
    """Numbered rows; `before` is called with the first number of a chunk before it is given."""

    places = [(0, "resid_post")]
    excluded: dict[str, int] = {}

    def __init__(self, total: int = 10**6, before: Any = lambda at: None) -> None:
        self.total, self.before, self.at = total, before, 0

    def next_rows(self) -> Tensor | None:
        self.before(self.at)
        count = min(7, self.total - self.at)
        self.at += count
        rows = torch.arange(self.at - count, self.at)[:, None].float()
        return rows.expand(count, 2) if count else None

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]

    def held_out(self) -> None:
        return None


def stream(source: Numbers, tokens: int = 400) -> BatchStream:
    return BatchStream(
        source, 2, tokens=tokens, batch_tokens=10, buffer_tokens=40, dtype=torch.float32, seed=3
    )


def all_of(prefetch: Prefetch, pause: float = 0.0) -> list[Tensor]:
    batches = []
    while (batch := prefetch.next_batch()) is not None:
        batches.append(batch)
        time.sleep(pause)
    return batches


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(*pair) for pair in zip(a, b, strict=True))


@pytest.mark.parametrize(("slow_source", "slow_trainer"), [(0.0, 0.002), (0.002, 0.0), (0.0, 0.0)])
def test_timing_changes_no_batch(slow_source: float, slow_trainer: float) -> None:
    expected = list(iter(stream(Numbers()).next_batch, None))
    source = Numbers(before=lambda at: time.sleep(slow_source))
    with Prefetch(stream(source), CPU) as prefetch:
        assert same(all_of(prefetch, slow_trainer), expected)
        assert prefetch.next_batch() is None, "and it stays at the end"


@pytest.mark.parametrize("stop_after", [0, 1, 7, 39])
def test_a_state_holds_what_was_made_ahead(stop_after: int) -> None:
    expected = list(iter(stream(Numbers()).next_batch, None))
    with Prefetch(stream(Numbers()), CPU) as prefetch:
        first = [prefetch.next_batch() for _ in range(stop_after)]
        while prefetch.ahead < min(BATCHES_AHEAD, 40 - stop_after):
            time.sleep(0.001)
        with prefetch.paused() as (tensors, meta):
            saved = {name: tensor.clone() for name, tensor in tensors.items()}
        rest = all_of(prefetch)
    assert same([*first, *rest], expected), "being paused changes nothing"  # type: ignore[list-item]
    again = stream(Numbers())
    again.load_state_dict(saved, meta)
    with Prefetch(again, CPU) as prefetch:
        assert same(all_of(prefetch), expected[stop_after:])


def test_a_batch_put_back_is_the_next_one() -> None:
    expected = list(iter(stream(Numbers()).next_batch, None))
    with Prefetch(stream(Numbers()), CPU) as prefetch:
        batch = prefetch.next_batch()
        assert batch is not None
        prefetch.put_back(batch)
        with prefetch.paused() as (tensors, _):
            assert torch.equal(tensors["pending"][:10], expected[0])
        assert same(all_of(prefetch), expected)


def test_it_never_runs_further_ahead_than_it_says() -> None:
    source = Numbers()
    with Prefetch(stream(source, tokens=100_000), CPU) as prefetch:
        while prefetch.take_stall() == 0.0:  # until it waits
            time.sleep(0.001)
        seen = source.at
        time.sleep(0.02)
        # The buffer, the batches that may wait, and less than a chunk and a batch on the way.
        assert source.at == seen <= 40 + 10 * BATCHES_AHEAD + 17
        prefetch.next_batch()


def test_who_waits_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only the test moves."""
    now = 100.0
    monkeypatch.setattr(prefetch_module, "time", SimpleNamespace(monotonic=lambda: now))
    with Prefetch(stream(Numbers(), tokens=100_000), CPU) as prefetch:
        for seconds in (2.5, 4.0):
            while prefetch._stalled_since is None:  # until it has made all that may wait
                time.sleep(0.001)
            assert prefetch.take_stall() == 0.0
            now += seconds
            assert prefetch.take_stall() == seconds and prefetch.take_stall() == 0.0
            now += 1
            prefetch.next_batch()
            while prefetch.ahead < BATCHES_AHEAD:
                time.sleep(0.001)
            assert prefetch.take_stall() == 1.0, "until the trainer took one"


def test_an_error_comes_after_the_batches_before_it() -> None:
    def before(at: int) -> None:
        if at >= 200:
            raise UserError("the network is gone")

    made = []
    with Prefetch(stream(Numbers(before=before)), CPU) as prefetch:
        with pytest.raises(UserError, match="the network is gone"):
            while True:
                made.append(prefetch.next_batch())
        # 203 rows came in; the buffer holds 40 of them.
        assert len(made) == 16
        with pytest.raises(UserError, match="the network is gone"):
            prefetch.next_batch()
        with prefetch.paused() as (_, meta):
            assert meta["drawn"] == 203


def test_a_source_that_runs_dry() -> None:
    with Prefetch(stream(Numbers(total=123)), CPU) as prefetch:
        with pytest.raises(UserError, match="the corpus ended after 123 of 400 `tokens`"):
            all_of(prefetch)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_trainer_that_fails_ends_the_thread(error: type[BaseException]) -> None:
    with pytest.raises(error):
        with Prefetch(stream(Numbers()), CPU) as prefetch:
            prefetch.next_batch()
            raise error
    assert not prefetch._thread.is_alive()


def test_a_source_that_hangs_does_not_hang_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch_module, "_LAST_PASS_SECONDS", 0.05)
    forever, hanging = threading.Event(), threading.Event()

    def before(at: int) -> None:
        if at > 100:
            hanging.set()
            forever.wait()

    with Prefetch(stream(Numbers(before=before)), CPU) as prefetch:
        while not hanging.is_set():
            prefetch.next_batch()
    assert not forever.is_set(), "the end did not wait for the source"
    forever.set()
    prefetch._thread.join()


def test_the_end_of_training_leaves_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    with Prefetch(stream(Numbers()), CPU) as prefetch:
        all_of(prefetch)
    assert threading.active_count() == before
