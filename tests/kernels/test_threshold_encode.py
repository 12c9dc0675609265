"""What lies above each latent's floor, on every path, in chunks."""

import pytest
import torch
from torch import Tensor

from saesteer.kernels import native, topk_encode
from saesteer.kernels.threshold_encode import (
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


def test_opcheck() -> None:
    x, W, b, floors = (t.double() for t in whole_numbers(6, 5, 30))
    torch.library.opcheck(threshold_encode_op, (x, W, b, floors))
