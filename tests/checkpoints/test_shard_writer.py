"""Shuffled shards, further columns, several writers in one folder, and the file cache."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints.files import read_json, write_tensors
from saesteer.checkpoints.shard_writer import ShardWriter, merge_parts, part_manifest
from saesteer.checkpoints.shards import ShardReader

PLACES = [(0, "resid_post"), (3, "resid_post")]


def writer_for(folder: Path, **changes: Any) -> ShardWriter:
    options: dict[str, Any] = {
        "layers": [0, 3], "sites": ["resid_post"], "d_model": 2, "dtype": torch.float32,
        "shard_tokens": 10, "facts": {"model": "m"},
    }  # fmt: skip
    return ShardWriter(folder, **{**options, **changes})


def add(writer: ShardWriter, start: int, count: int, **options: Any) -> None:
    ids = torch.arange(start, start + count)
    rows = {place: (ids[:, None] + 100.0 * place[0]).expand(count, 2) for place in PLACES}
    writer.add(rows, ids, {"round": start // 10}, **options)


def test_a_shuffled_shard_keeps_its_rows_together(tmp_path: Path) -> None:
    def write(name: str, seed: int | None) -> list[list[int]]:
        writer = writer_for(tmp_path / name, shuffle_seed=seed)
        for start in range(0, 40, 10):
            add(writer, start, 10, extra={"positions": torch.arange(start, start + 10)})
        writer.close()
        reader = ShardReader(tmp_path / name)
        reader.verify()
        orders = []
        for index in range(len(reader)):
            low, ids = reader.shard(index, 0)
            high, same_ids = reader.shard(index, 3)
            assert torch.equal(ids, same_ids) and torch.equal(high, low + 300)
            assert torch.equal(low[:, 0], ids.float())
            assert torch.equal(reader.columns(index)["positions"], ids.long())
            assert sorted(ids.tolist()) == list(range(10 * index, 10 * index + 10))
            orders.append([i % 10 for i in ids.tolist()])
        return orders

    plain, shuffled = write("a", None), write("b", 7)
    assert all(order == sorted(order) for order in plain)
    assert all(order != sorted(order) for order in shuffled)
    assert len(set(map(tuple, shuffled))) == 4, "every shard has an order of its own"
    assert write("c", 7) == shuffled != write("d", 8)


def test_a_resumed_writer_shuffles_as_before(tmp_path: Path) -> None:
    def ids(folder: Path) -> list[int]:
        reader = ShardReader(folder)
        return [int(i) for index in range(len(reader)) for i in reader.shard(index, 0)[1]]

    whole = writer_for(tmp_path / "whole", shuffle_seed=1)
    for start in range(0, 30, 10):
        add(whole, start, 10)
    whole.close()
    add(writer_for(tmp_path / "cut", shuffle_seed=1), 0, 10)
    rest, _ = ShardWriter.resume(tmp_path / "cut")
    for start in (10, 20):
        add(rest, start, 10)
    rest.close()
    assert ids(tmp_path / "cut") == ids(tmp_path / "whole")


def test_parts_never_write_one_file_and_become_one_manifest(tmp_path: Path) -> None:
    writer_for(tmp_path, facts={"model": "m", "processes": 2})
    parts = [writer_for(tmp_path, part=(rank, 2), shard_tokens=10**9) for rank in range(2)]
    for start in range(0, 60, 10):
        add(parts[start // 10 % 2], start, 10)
        parts[start // 10 % 2].checkpoint()
    assert ShardReader(tmp_path, allow_empty=True).tokens == 0, "no half result is listed"
    for part in parts:
        part.close()
    half = tmp_path / "layer-3" / ".shard-00007.safetensors.0a1b2c3d.tmp"
    half.touch()  # of a process that was killed
    manifest = merge_parts(tmp_path, 2, {"excluded": {"sinks": 3}})
    assert manifest == read_json(tmp_path / "manifest.json")
    assert not {"part", "history", "cursor"} & manifest.keys()
    assert manifest["complete"] and manifest["tokens"] == 60
    reader = ShardReader(tmp_path)
    reader.verify()
    numbers = sorted(int(i) for index in range(len(reader)) for i in reader.shard(index, 3)[1])
    assert numbers == list(range(60))
    assert [path.name for path in tmp_path.glob("*.json")] == ["manifest.json"]
    assert not half.exists()


@pytest.mark.parametrize("back_to", [0, 1, 2])
def test_a_part_goes_back_to_an_earlier_place(tmp_path: Path, back_to: int) -> None:
    other = writer_for(tmp_path, part=(1, 2), shard_tokens=10**9)
    add(other, 10, 10)
    other.checkpoint()
    writer = writer_for(tmp_path, part=(0, 2), shard_tokens=10**9)
    for turn in (1, 2, 3):
        add(writer, 10 * turn, 10)
        writer.checkpoint()
    again, cursor = ShardWriter.resume(tmp_path, part=(0, 2))
    assert again.rounds("round") == [0, 1, 2, 3] and cursor == {"round": 3}
    cursor = again.go_back("round", back_to)
    assert cursor == ({"round": back_to} if back_to else {})
    assert again.tokens == 10 * back_to and again.rounds("round") == list(range(back_to + 1))
    left = sorted(path.name for path in (tmp_path / "layer-0").iterdir())
    own = [f"shard-{2 * n:05d}.safetensors" for n in range(back_to)]
    assert left == sorted([*own, "shard-00001.safetensors"]), "the other part's file stays"
    again, _ = ShardWriter.resume(tmp_path, part=(0, 2))
    assert again.tokens == 10 * back_to


def test_names_of_manifests() -> None:
    assert part_manifest((0, 1)) == "manifest.json"
    assert part_manifest((2, 16)) == "manifest-part-0002-of-0016.json"


def test_reading_ahead_changes_nothing(tmp_path: Path) -> None:
    writer = writer_for(tmp_path)
    add(writer, 0, 12)
    writer.close()
    reader = ShardReader(tmp_path)
    reader.read_ahead(0, reader.places)
    assert torch.equal(reader.shard(0, 0)[0][:, 0], torch.arange(12.0))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be asked")
def test_shards_leave_the_file_cache_once_they_are_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []

    def spy(name: str, result: Any) -> None:
        def call(descriptor: int, *arguments: Any) -> Any:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            calls.append((name, Path(path).name))
            if arguments:
                assert arguments == (0, 0, os.POSIX_FADV_DONTNEED)
                raise result
            return result

        monkeypatch.setattr(os, name, call)

    spy("fsync", None)
    spy("posix_fadvise", OSError(22, "a wish that cannot be granted"))
    writer = writer_for(tmp_path / "acts")
    add(writer, 0, 10)
    about_shards = [name for name, file in calls if file.startswith(".shard-")]
    assert about_shards == ["fsync", "posix_fadvise"] * 2
    assert ShardReader(tmp_path / "acts").tokens == 10
    calls.clear()
    write_tensors(tmp_path / "sae.safetensors", {"W": torch.ones(2)})
    assert "posix_fadvise" not in [name for name, _ in calls], "what is read soon stays"
