"""Rows leave mixed, each exactly once, from memory that never grows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.activations.shuffle_buffer import ShuffleBuffer


def numbered(start: int, count: int, width: int = 3) -> Tensor:
    """Rows that tell their number and hold together."""
    return torch.arange(start, start + count)[:, None] + 1000.0 * torch.arange(width)


def flow(buffer: ShuffleBuffer, sizes: list[int]) -> list[Tensor]:
    """Everything that leaves when rows come in in chunks of these sizes."""
    batches: list[Tensor] = []
    start = 0
    for size in sizes:
        batches += buffer.put(numbered(start, size))
        start += size
    while (batch := buffer.take()) is not None:
        batches.append(batch)
    return batches


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 6),
    capacity=st.integers(0, 20),
    sizes=st.lists(st.integers(0, 17), max_size=8),
    seed=st.integers(0, 3),
)
def test_every_row_leaves_exactly_once(
    batch: int, capacity: int, sizes: list[int], seed: int
) -> None:
    buffer = ShuffleBuffer(batch + capacity, 3, batch, torch.float32, seed)
    memory = buffer.rows.data_ptr(), buffer.rows.untyped_storage().nbytes()
    batches = flow(buffer, sizes)
    rows = torch.cat([numbered(0, 0), *batches])
    assert torch.equal(rows[rows[:, 0].argsort()], numbered(0, sum(sizes)))
    assert sum(len(b) != batch for b in batches) <= 2 and all(0 < len(b) <= batch for b in batches)
    if sum(sizes) % batch == 0 and (batch + capacity) % batch == 0:
        assert all(len(b) == batch for b in batches)
    assert len(buffer) == 0
    assert memory == (buffer.rows.data_ptr(), buffer.rows.untyped_storage().nbytes())


def test_batches_do_not_depend_on_how_rows_came_in() -> None:
    def run(sizes: list[int]) -> list[Tensor]:
        return flow(ShuffleBuffer(12, 3, 4, torch.float32, 7), sizes)

    expected = run([60])
    for sizes in ([1] * 60, [7, 30, 5, 18], [12, 4, 44]):
        assert all(torch.equal(*pair) for pair in zip(expected, run(sizes), strict=True))
    other = flow(ShuffleBuffer(12, 3, 4, torch.float32, 8), [60])
    assert not all(torch.equal(*pair) for pair in zip(expected, other, strict=True))


def test_nothing_leaves_before_the_buffer_is_full() -> None:
    buffer = ShuffleBuffer(10, 3, 4, torch.float32, 0)
    assert buffer.put(numbered(0, 9)) == [] and not buffer.full
    assert buffer.put(numbered(9, 4)) == [] and buffer.full and len(buffer) == 13
    (batch,) = buffer.put(numbered(13, 1))
    assert len(batch) == 4 and len(buffer) == 10


def test_batches_are_a_mixture_of_the_whole_buffer() -> None:
    """Position in gives no clue to position out, beyond the buffer's own depth."""
    capacity, batch = 1024, 64
    batches = flow(ShuffleBuffer(capacity, 3, batch, torch.float32, 0), [128] * 80)
    steady = batches[20:140]
    spreads = torch.tensor([float(b[:, 0].std()) for b in steady])
    # A row stays 16 exchanges on average, geometrically: its age varies by about the capacity.
    # 64 samples an estimate: within a third.
    assert 0.67 * capacity < float(spreads.mean()) < 1.33 * capacity
    # Rows that came in as neighbours leave in the same batch as seldom as any two rows.
    number = torch.cat([torch.full((len(b),), float(i)) for i, b in enumerate(batches)])
    order = torch.cat(batches)[:, 0].long()
    left_at = torch.empty(len(order))
    left_at[order] = number
    together = (left_at[:-1] == left_at[1:]).float().mean()
    assert float(together) < 4 * batch / capacity
    # Within a batch there is no order at all: neighbours rise as often as they fall.
    rises = torch.cat([(b[1:, 0] > b[:-1, 0]) for b in steady]).float().mean()
    assert abs(float(rises) - 0.5) < 0.03  # 7,500 pairs: five standard deviations


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 13), min_size=1, max_size=8),
    cut=st.integers(0, 7),
    taken=st.integers(0, 4),
)
def test_the_state_continues_to_the_bit(sizes: list[int], cut: int, taken: int) -> None:
    def fresh() -> ShuffleBuffer:
        return ShuffleBuffer(9, 3, 4, torch.bfloat16, 5)

    buffer, start = fresh(), 0
    for size in sizes[:cut]:
        buffer.put(numbered(start, size).bfloat16())
        start += size
    if cut >= len(sizes):
        for _ in range(taken):
            buffer.take()
    state = {name: tensor.clone() for name, tensor in buffer.state_dict().items()}
    other = fresh()
    other.put(numbered(500, 30).bfloat16())  # whatever it held before is gone
    other.load_state_dict(state)
    assert len(other) == len(buffer)
    rest = [flow(b, [*sizes[cut:], 11]) for b in (buffer, other)]
    assert len(rest[0]) == len(rest[1])
    assert all(torch.equal(*pair) for pair in zip(*rest, strict=True))


def test_what_leaves_is_a_copy() -> None:
    buffer = ShuffleBuffer(4, 3, 4, torch.float32, 0)
    (batch,) = buffer.put(numbered(0, 8))
    before = batch.clone()
    buffer.put(numbered(8, 8))
    assert torch.equal(batch, before)
    last = buffer.take()
    assert last is not None
    before = last.clone()
    buffer.put(numbered(20, 4))
    assert torch.equal(last, before)


def test_a_buffer_smaller_than_a_batch() -> None:
    with pytest.raises(UsageError, match=r"`buffer_tokens` must be at least .* \(4\), got 3"):
        ShuffleBuffer(3, 2, 4, torch.float32, 0)
