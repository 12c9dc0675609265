"""Writing beside the work: in order, bounded, and honest about errors."""

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints.background import BackgroundWriter
from saesteer.checkpoints.durable import Draft
from saesteer.checkpoints.errors import NonFiniteError, UserError
from saesteer.checkpoints.shard_writer import ShardWriter
from saesteer.checkpoints.shards import ShardReader

PLACE = (0, "resid_post")


def writer_for(folder: Path, shard_tokens: int = 10) -> ShardWriter:
    return ShardWriter(
        folder, layers=[0], sites=["resid_post"], d_model=2, dtype=torch.float32,
        shard_tokens=shard_tokens, facts={"model": "m"},
    )  # fmt: skip


def add(writer: BackgroundWriter, start: int, count: int) -> None:
    ids = torch.arange(start, start + count)
    rows = ids[:, None].float().expand(count, 2)
    writer.add({PLACE: rows}, ids, {"next": start + count})


def ids_in(folder: Path) -> list[int]:
    return [int(i) for _, _, ids in ShardReader(folder).iter_shards() for i in ids]


def test_what_is_handed_over_is_written_in_order(tmp_path: Path) -> None:
    with BackgroundWriter(writer_for(tmp_path), 25) as writer:
        for start in range(0, 96, 6):
            add(writer, start, 6)
        writer.close({"excluded": 1})
        assert ids_in(tmp_path) == list(range(96)), "on the disk when close returns"
    reader = ShardReader(tmp_path)
    assert reader.complete and reader.manifest["excluded"] == 1
    assert reader.shard_tokens == [12] * 8


def test_add_does_not_wait_for_the_disk_but_memory_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    original = Draft.__enter__

    def slow(draft: Draft) -> Draft:
        go.wait()
        return original(draft)

    inner = writer_for(tmp_path)
    monkeypatch.setattr(Draft, "__enter__", slow)
    with BackgroundWriter(inner, 25) as writer:
        add(writer, 0, 10)  # fills a shard: the disk is busy from here on
        add(writer, 10, 10)
        added: list[int] = []
        held_up = threading.Event()
        wait = writer._changed.wait

        def seen_to_wait() -> bool:
            if threading.current_thread() is thread:
                held_up.set()
            return wait()

        def more() -> None:
            for start in (20, 30, 40):
                add(writer, start, 10)
                added.append(start)
            held_up.set()  # it never was, which the test below sees

        thread = threading.Thread(target=more)
        monkeypatch.setattr(writer._changed, "wait", seen_to_wait)
        thread.start()
        held_up.wait()
        assert len(added) < 3, "a disk that stands still holds up the one who adds"
        go.set()
        thread.join()
        writer.close()
    assert ids_in(tmp_path) == list(range(50))


def test_checkpoint_returns_when_all_is_on_the_disk(tmp_path: Path) -> None:
    with BackgroundWriter(writer_for(tmp_path), 100) as writer:
        add(writer, 0, 4)
        writer.checkpoint()
        assert ids_in(tmp_path) == [0, 1, 2, 3]
        add(writer, 4, 2)
        writer.flush({"next": 6})
        writer.close()
    assert ShardReader(tmp_path).shard_tokens == [4, 2]


def test_an_error_reaches_the_caller_and_nothing_follows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Draft.__enter__

    def full(draft: Draft) -> Draft:
        if "shard-00001" in draft.path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(draft)

    inner = writer_for(tmp_path)
    monkeypatch.setattr(Draft, "__enter__", full)
    with pytest.raises(UserError, match="no space left while writing .*shard-00001"):
        with BackgroundWriter(inner, 25) as writer:
            for start in range(0, 10_000, 10):
                add(writer, start, 10)
    assert ids_in(tmp_path) == list(range(10))
    resumed, cursor = ShardWriter.resume(tmp_path)
    assert cursor == {"next": 10} and resumed.tokens == 10


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_leaving_by_an_error_ends_the_thread(tmp_path: Path, error: Any) -> None:
    with pytest.raises(error):
        with BackgroundWriter(writer_for(tmp_path), 25) as writer:
            add(writer, 0, 12)
            raise error
    assert not writer._thread.is_alive()
    assert (
        ids_in(tmp_path) == list(range(12))
        if ShardReader(tmp_path, allow_empty=True).tokens
        else True
    )


def test_numbers_that_are_none_are_refused_at_once(tmp_path: Path) -> None:
    with BackgroundWriter(writer_for(tmp_path), 25) as writer:
        add(writer, 0, 6)
        rows = torch.tensor([[1.0, 2.0], [torch.inf, 0.0]])
        with pytest.raises(NonFiniteError, match="layer 0 resid_post"):
            writer.add({PLACE: rows}, torch.tensor([6, 7]), {"next": 8})
        writer.checkpoint()
    assert ids_in(tmp_path) == list(range(6))


def test_rows_of_the_stored_type_are_not_copied(tmp_path: Path) -> None:
    inner = writer_for(tmp_path)
    rows = torch.ones(3, 2)
    with BackgroundWriter(inner, 25) as writer:
        writer.add({PLACE: rows}, torch.arange(3, dtype=torch.int32))
        writer.add({PLACE: rows.double()}, torch.arange(3))
    first, second = inner._rows[PLACE]
    assert first.data_ptr() == rows.data_ptr()
    assert second.dtype == torch.float32
    inner.add({PLACE: rows}, torch.arange(3))
    rows.fill_(7.0)
    assert bool((inner._rows[PLACE][-1] == 1).all()), "a copy is taken"


def test_page_locked_rows_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, rows = writer_for(tmp_path), torch.ones(3, 2)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    with BackgroundWriter(inner, 25) as writer:
        writer.add({PLACE: rows}, torch.arange(3))
    assert inner._rows[PLACE][0].data_ptr() != rows.data_ptr()
