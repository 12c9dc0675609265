"""Batches from shards and from a live model: every row counted, any position resumable."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from saesteer.checkpoints.errors import NonFiniteError, UserError
from saesteer.checkpoints.files import sha256_file
from saesteer.checkpoints.shard_writer import ShardWriter
from saesteer.checkpoints.shards import ShardReader
from saesteer.sae.activations.batches import ActivationSource, BatchStream, LiveSource, ShardSource
from saesteer.sae.activations.reader import open_activations
from saesteer.sae.config import HarvestConfig, TextConfig
from saesteer.sae.model.hooks import resolve_site
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.verbs.harvest import harvest

Shared = Callable[..., LanguageModel]

D_MODEL = 4
SIZES = (10, 7, 23)
PLACES = [(1, "resid_post"), (6, "resid_post")]
INFINITE = float("inf")


def numbered(start: int, count: int, dtype: torch.dtype = torch.float32) -> dict[Any, Tensor]:
    """Rows that tell their number and their place."""
    ids = torch.arange(start + 1, start + count + 1)[:, None] / 8
    return {
        place: (ids + 16 * at).expand(count, D_MODEL).to(dtype) for at, place in enumerate(PLACES)
    }


@pytest.fixture
def shards(tmp_path: Path) -> Callable[..., ShardReader]:
    def make(sizes: tuple[int, ...] = SIZES, dtype: torch.dtype = torch.float32) -> ShardReader:
        writer = ShardWriter(
            tmp_path / "shards", layers=[1, 6], sites=["resid_post"], d_model=D_MODEL,
            dtype=dtype, shard_tokens=1, facts={"model": {"name": "m", "n_layers": 8}},
        )  # fmt: skip
        start = 0
        for size in sizes:
            writer.add(numbered(start, size), torch.arange(size))
            start += size
        writer.close()
        return ShardReader(tmp_path / "shards")

    return make


def numbers(rows: Tensor) -> list[int]:
    return [round(float(value) * 8) for value in rows[:, 0]]


def draw(source: ActivationSource, rows: int) -> Tensor:
    pieces: list[Tensor] = []
    while sum(map(len, pieces)) < rows:
        piece = source.next_rows()
        assert piece is not None
        pieces.append(piece)
    return torch.cat(pieces)


# --- shards


@pytest.mark.parametrize("chunk", [3, 8192])
def test_every_epoch_covers_every_row_once_in_a_new_order(
    chunk: int, shards: Callable[..., ShardReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saesteer.sae.activations.batches._CHUNK_ROWS", chunk)
    source = ShardSource(shards(), PLACES, INFINITE, seed=4)
    rows = draw(source, 120)
    assert rows.shape == (120, 2 * D_MODEL)
    assert torch.equal(rows[:, D_MODEL:], rows[:, :D_MODEL] + 16), "layers stay side by side"
    epochs = [numbers(rows[at : at + 40]) for at in (0, 40, 80)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(1, 41))
        assert epoch != sorted(epoch)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    firsts = {epoch[0] for epoch in epochs} | {epoch[1] for epoch in epochs}
    assert len(firsts) > 2
    again = draw(ShardSource(shards(), PLACES, INFINITE, seed=4), 120)
    other = draw(ShardSource(shards(), PLACES, INFINITE, seed=5), 120)
    assert torch.equal(again, rows) and not torch.equal(other, rows)


def test_the_order_of_shards_changes_too(shards: Callable[..., ShardReader]) -> None:
    source = ShardSource(shards((5,) * 6), PLACES[:1], INFINITE, seed=0)
    orders = set()
    for _ in range(4):
        epoch = [numbers(source.next_rows())[0] for _ in range(6)]  # type: ignore[arg-type]
        orders.add(tuple((number - 1) // 5 for number in epoch))
    assert len(orders) == 4 and all(sorted(order) == list(range(6)) for order in orders)


def test_some_layers_only_and_in_the_order_asked(shards: Callable[..., ShardReader]) -> None:
    source = ShardSource(shards(), PLACES[::-1], INFINITE, seed=4)
    rows = draw(source, 40)
    assert torch.equal(rows[:, :D_MODEL], rows[:, D_MODEL:] + 16)
    assert source.places == PLACES[::-1]


def test_shards_resume_at_any_chunk(
    shards: Callable[..., ShardReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saesteer.sae.activations.batches._CHUNK_ROWS", 6)
    reader = shards()
    whole = ShardSource(reader, PLACES, 2.0, seed=4)
    source = ShardSource(reader, PLACES, 2.0, seed=4)
    for _ in range(25):
        state = json.loads(json.dumps(source.state_dict()))
        source = ShardSource(reader, PLACES, 2.0, seed=4)
        source.load_state_dict(state)
        a, b = whole.next_rows(), source.next_rows()
        assert a is not None and b is not None and torch.equal(a, b)
    assert source.excluded == whole.excluded and whole.excluded["sinks"] > 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_any_float_type(dtype: torch.dtype, shards: Callable[..., ShardReader]) -> None:
    rows = draw(ShardSource(shards(dtype=dtype), PLACES, INFINITE, seed=4), 40)
    assert rows.dtype == dtype and sorted(numbers(rows)) == list(range(1, 41))


def test_nan_in_shards_is_an_error_not_a_sink(shards: Callable[..., ShardReader]) -> None:
    reader = shards()
    path = reader.folder / "layer-6" / "shard-00001.safetensors"
    tensors = load_file(path)
    tensors["activations"][3, 2] = torch.nan
    save_file(tensors, path)
    # As another tool might have written them: whole, listed, and not finite.
    manifest = json.loads((reader.folder / "manifest.json").read_text())
    for entry in manifest["shards"]:
        entry["sha256"] = sha256_file(reader.folder / entry["file"])
    (reader.folder / "manifest.json").write_text(json.dumps(manifest))
    manifest = reader.folder / "manifest.json"
    content = json.loads(manifest.read_text())
    for entry in content["shards"]:
        entry["sha256"] = ""  # the file is not the one that was harvested
    manifest.write_text(json.dumps(content))
    with pytest.raises(NonFiniteError, match="`activations` .* in shard 1 of layer 6 resid_post"):
        draw(ShardSource(ShardReader(reader.folder), PLACES, 10.0, seed=4), 40)


def test_shards_of_sinks_alone(
    shards: Callable[..., ShardReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ShardSource(shards(), PLACES, 10.0, seed=4)
    monkeypatch.setattr(source.sinks, "keep", lambda rows: torch.zeros(len(rows[PLACES[0]])) > 0)
    with pytest.raises(UserError, match="`activations` holds no rows to train on"):
        draw(source, 1)


# --- live


def test_live_rows_are_the_harvested_ones(shared_lm: Shared, tmp_path: Path) -> None:
    lm = shared_lm()
    text = TextConfig(context=24, batch_size=4)
    harvest(lm, tmp_path / "out", HarvestConfig(layers=(0, 2), tokens=300, text=text))
    reader = ShardReader(tmp_path / "out")
    points = [resolve_site(lm, layer) for layer in (0, 2)]
    stream = open_activations(lm, points, text, replies_folder=tmp_path)
    source = LiveSource(stream)
    rows = draw(source, 300)[:300]
    assert source.places == reader.places and not rows.is_inference()
    for at, place in enumerate(reader.places):
        columns = slice(at * lm.d_model, (at + 1) * lm.d_model)
        stored = [reader.shard(index, *place)[0] for index in range(len(reader))]
        assert torch.equal(rows[:, columns], torch.cat(stored))
    other = LiveSource(open_activations(lm, points, text, replies_folder=tmp_path))
    other.load_state_dict(json.loads(json.dumps(source.state_dict())))
    a, b = source.next_rows(), other.next_rows()
    assert a is not None and b is not None and torch.equal(a, b)
    assert other.excluded == source.excluded == stream.excluded


# --- batches


class Counter:
    """Rows numbered in the order in which they are drawn, `total` of them."""

    places = [(0, "resid_post")]
    excluded: dict[str, int] = {}

    def __init__(self, total: int, chunk: int = 7) -> None:
        self.total, self.chunk, self.at = total, chunk, 0

    def next_rows(self) -> Tensor | None:
        count = min(self.chunk, self.total - self.at)
        self.at += count
        start = float(self.at - count)
        return (torch.arange(count)[:, None] + start).expand(count, 2) if count else None

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]

    def held_out(self) -> None:
        return None


def batch_stream(source: Any, tokens: int = 103, buffer: int = 21, **more: Any) -> BatchStream:
    options = {"batch_tokens": 10, "dtype": torch.float32, "seed": 3, **more}
    return BatchStream(source, 2, tokens=tokens, buffer_tokens=buffer, **options)


@pytest.mark.parametrize("buffer", [10, 21, 1000])
def test_exactly_the_tokens_in_full_batches(buffer: int) -> None:
    stream = batch_stream(Counter(10**6), buffer=buffer)
    batches = list(iter(stream.next_batch, None))
    assert [len(batch) for batch in batches] == [10] * 10
    values = torch.cat(batches)[:, 0]
    assert sorted(values.tolist()) == [float(i) for i in range(100)]
    # At most half of the run waits in the buffer: there is something to mix to the end.
    assert len(stream.buffer.rows) == min(buffer // 10 * 10, 50)


def test_fill_shows_the_first_rows() -> None:
    told: list[tuple[int, int]] = []
    stream = batch_stream(Counter(10**6), filling=lambda done, total: told.append((done, total)))
    sample = stream.fill()
    assert sample[:, 0].tolist() == [float(i) for i in range(20)]
    assert told[0] == (0, 20) and told[-1][0] >= 20
    assert torch.cat(list(iter(stream.next_batch, None))).shape == (100, 2)


def test_a_source_that_ends_too_soon() -> None:
    stream = batch_stream(Counter(64))
    with pytest.raises(UserError, match="the corpus ended after 64 of 100 `tokens`: .*`epochs`"):
        while stream.next_batch() is not None:
            pass


@pytest.mark.parametrize("chunk", [1, 7, 45])
def test_batches_resume_to_the_bit_anywhere(chunk: int) -> None:
    expected = list(iter(batch_stream(Counter(10**6, chunk)).next_batch, None))
    stream = batch_stream(Counter(10**6, chunk))
    stream.fill()
    for batch in expected:
        tensors, meta = stream.state_dict()
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        meta = json.loads(json.dumps(meta))
        stream = batch_stream(Counter(10**6, chunk))
        stream.load_state_dict(tensors, meta)
        found = stream.next_batch()
        assert found is not None and torch.equal(found, batch)
    assert stream.next_batch() is None


def test_memory_is_the_buffer_and_a_chunk() -> None:
    stream = batch_stream(Counter(10**6, chunk=45), tokens=1000, buffer=200)
    held = 0
    while stream.next_batch() is not None:
        waiting = sum(len(batch) for batch in stream._pending)
        held = max(held, waiting)
    assert held <= 50 and len(stream.buffer.rows) == 200


def test_rows_after_the_last_batch_follow_those_of_training() -> None:
    """None of them was in a batch; fewer come where the source ends."""
    source = NumberedRows(96, of=10)
    stream = BatchStream(
        source, 1, tokens=60, batch_tokens=12, buffer_tokens=24, dtype=torch.float32, seed=0
    )
    trained = []
    while (batch := stream.next_batch()) is not None:
        trained += batch[:, 0].tolist()
    assert sorted(trained) == list(range(60))
    assert stream.rows_after(25)[:, 0].tolist() == list(range(60, 85))
    # Rows of a chunk that was cut stay unread: the source goes on with its next chunk.
    assert stream.rows_after(25)[:, 0].tolist() == list(range(90, 96))
    assert len(stream.rows_after(25)) == 0


class NumberedRows:
    """Rows 0, 1, 2, ... in chunks."""

    def __init__(self, rows: int, of: int) -> None:
        self.chunks = list(torch.arange(float(rows))[:, None].split(of))
        self.places = [(0, "resid_post")]
        self.excluded: dict[str, int] = {}

    def next_rows(self) -> torch.Tensor | None:
        return self.chunks.pop(0) if self.chunks else None

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass

    def held_out(self) -> None:
        return None
