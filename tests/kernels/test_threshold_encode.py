"""What lies above each latent's floor, on every path, in chunks."""

import pytest
import torch
from torch import Tensor

from saesteer.kernels import native, topk_encode
from saesteer.kernels.ops import encode_above
from saesteer.kernels.threshold_encode import (
    at_capacity,
    threshold_encode_native,
    threshold_encode_op,
    threshold_encode_reference,
    threshold_encode_torch,
)

PATHS = [threshold_encode_torch] + [threshold_encode_native] * native.numba_installed()


def whole_numbers(batch: int, d_model: int, d_sae: int) -> list[Tensor]:
    """Small whole numbers and halves: exact in float32 on every path."""
    rng = torch.Generator().manual_seed(batch + d_sae)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=rng).float()

    return [draw(batch, d_model), draw(d_sae, d_model), draw(d_sae), draw(d_sae) + 0.5]


@pytest.mark.parametrize("rows", [1, 4, 1000])
@pytest.mark.parametrize("run", PATHS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 41, 60), (0, 8, 20), (33, 6, 451)], ids=str)
def test_it_is_the_dense_comparison(
    shape: tuple[int, int, int], run: object, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topk_encode, "CPU_CHUNK_BYTES", 0)
    monkeypatch.setattr(topk_encode, "CPU_CHUNK_ROWS", rows)
    x, W, b, floors = whole_numbers(*shape)
    for lift in (0, -100, 100):
        found = run(x, W, b, floors + lift)  # type: ignore[operator]
        wanted = threshold_encode_reference(x, W, b, floors + lift)
        assert all(map(torch.equal, found, wanted)), lift
    if len(x):
        x[0] = torch.nan
        found = run(x, W, b, floors)  # type: ignore[operator]
        assert all(map(torch.equal, found, threshold_encode_reference(x, W, b, floors)))


def so_many(
    x: Tensor, W: Tensor, b: Tensor, floors: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What `capacity` means, one pair after the other."""
    pre_acts = x @ W.T + b
    (batch, d_sae), margins = pre_acts.shape, (pre_acts - floors).nan_to_num(0, posinf=torch.inf)
    ranked = torch.sort(margins.flatten(), descending=True, stable=True)
    kept = ranked.indices[:capacity][ranked.values[:capacity] > 0]
    mask = torch.zeros(batch * d_sae, dtype=torch.bool)
    mask[kept] = True
    mask = mask.view(batch, d_sae)
    missing, room = capacity - len(kept), [d_sae - int(row.sum()) for row in mask]
    shares = [
        min(room[row], (row + 1) * missing // batch - row * missing // batch)
        for row in range(batch)
    ]
    left = missing - sum(shares)
    values, indices, starts = [], [], [0]
    for row in range(batch):
        more = min(left, room[row] - shares[row])
        left -= more
        fillers = [f for f in range(d_sae) if not mask[row, f]][: shares[row] + more]
        for f in range(d_sae):
            if mask[row, f] or f in fillers:
                values.append(float(pre_acts[row, f]) if mask[row, f] else -torch.inf)
                indices.append(f)
        starts.append(len(values))
    return (
        torch.tensor(values, dtype=pre_acts.dtype),
        torch.tensor(indices, dtype=torch.int64),
        torch.tensor(starts),
    )


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("lift", [-50, 0, 4, 100])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 41, 60), (0, 8, 20), (3, 1000, 17)], ids=str)
def test_so_many_entries_whatever_is_above(
    shape: tuple[int, int, int], lift: float, share: float
) -> None:
    x, W, b, floors = whole_numbers(*shape)
    if len(x) > 2:
        x[1] = torch.nan
    capacity = round(share * shape[0] * shape[2])
    wanted = so_many(x, W, b, floors + lift, capacity)
    assert len(wanted[0]) == capacity
    assert all(map(torch.equal, encode_above(x, W, b, floors + lift, capacity), wanted))


def test_fillers_are_spread_and_the_furthest_stay() -> None:
    floors = torch.zeros(4)
    x = torch.tensor([[1.0, 3, -1, 2], [5, -1, -1, -1], [-1, -1, -1, -1]])
    entries = threshold_encode_torch(x, torch.eye(4), torch.zeros(4), floors)
    values, indices, starts = at_capacity(entries, floors, 2)
    assert (values.tolist(), indices.tolist(), starts.tolist()) == ([3, 5], [1, 0], [0, 1, 2, 2])
    values, indices, starts = at_capacity(entries, floors, 7)
    nothing = -torch.inf
    assert values.tolist() == [1, 3, nothing, 2, 5, nothing, nothing][: len(values)]
    assert starts.tolist() == [0, 4, 6, 7]


def test_opcheck() -> None:
    x, W, b, floors = (t.double() for t in whole_numbers(6, 5, 30))
    torch.library.opcheck(threshold_encode_op, (x, W, b, floors))
    torch.library.opcheck(threshold_encode_op, (x, W, b, floors, 40))
    with pytest.raises(ValueError, match=r"capacity must be in 0..180 .*, got 181"):
        encode_above(x, W, b, floors, 181)
