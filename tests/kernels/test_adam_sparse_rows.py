"""Sum and step in one pass, against the sum followed by the step."""

import pytest
import torch
from torch import Tensor

from saesteer.kernels.adam_sparse_rows import adam_sparse_rows_op
from saesteer.kernels.ops import (
    adam_rows_,
    adam_schedule,
    adam_sparse_rows_,
    sort_indices,
    sparse_row_grads,
)

# batch, d_model, d_sae, k; many entries a latent, and latents without any.
SHAPES = [(1, 1, 1, 1), (3, 41, 50, 5), (5, 1000, 33, 33), (0, 8, 20, 4)]
SHAPES += [(400, 7, 3, 2), (6, 4, 900, 3)]
HYPER = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}


def schedule(step: int) -> Tensor:
    return torch.tensor(adam_schedule(step, 3e-3, 0.9, 0.99), dtype=torch.float64)


def unit(*shape: int) -> Tensor:
    random = torch.Generator().manual_seed(5)
    return torch.nn.functional.normalize(torch.randn(shape, generator=random), dim=1)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("with_extra", [False, True])
@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_sum_then_step(shape: tuple[int, ...], unit_rows: bool, with_extra: bool) -> None:
    batch, d_model, d_sae, k = shape
    random = torch.Generator().manual_seed(0)
    param = unit(d_sae, d_model)
    if d_sae > 2:
        param[2] = 0
    state = [param, torch.zeros_like(param), torch.zeros_like(param)]
    wide = [t.double() for t in state]
    for step in range(1, 6):
        weights = torch.randn(batch, k, generator=random).relu()
        indices = torch.randint(0, d_sae, (batch, k), generator=random)
        rows = torch.randn(batch, d_model, generator=random)
        order = sort_indices(indices, d_sae)
        extra_ids = torch.randperm(d_sae, generator=random)[: d_sae // 2] if with_extra else None
        extra = None
        if extra_ids is not None:
            extra = torch.randn(len(extra_ids), d_model, generator=random)
        sums, counts = adam_sparse_rows_(
            *state, weights, indices, rows, order, factor=0.5, schedule=schedule(step),
            unit_rows=unit_rows, extra=extra, extra_ids=extra_ids, **HYPER,
        )  # fmt: skip
        grads, expected_counts = sparse_row_grads(weights.double(), indices, rows.double(), d_sae)
        grads *= 0.5
        if extra is not None and extra_ids is not None:
            grads[extra_ids] += extra.double()
        adam_rows_(
            wide[0], grads, wide[1], wide[2], schedule=schedule(step), unit_rows=unit_rows, **HYPER
        )
        dense = torch.zeros(d_sae, dtype=torch.float64)
        dense.index_add_(0, indices.flatten(), weights.double().flatten())
        torch.testing.assert_close(sums.double(), 0.5 * dense, rtol=1e-5, atol=1e-5)
        assert torch.equal(counts, expected_counts)
    for ours, theirs in zip(state, wide, strict=True):
        # Five steps of 3e-3; Adam divides small sums by their own size, rounding and all.
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    if d_sae > 2 and unit_rows:
        assert not state[0][2].any(), "a row of zeros has no direction"


def test_threads_do_not_change_the_result() -> None:
    results = []
    before = torch.get_num_threads()
    weights, rows = torch.randn(500, 8), torch.randn(500, 33)
    indices = torch.randint(0, 90, (500, 8))
    indices[:, 0] = 7  # in every row
    order = sort_indices(indices, 90)
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            state = [unit(90, 33), torch.zeros(90, 33), torch.zeros(90, 33)]
            out = adam_sparse_rows_(
                *state, weights, indices, rows, order, factor=1.0, schedule=schedule(1), **HYPER
            )
            results.append([*state, *out])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opcheck() -> None:
    indices = torch.randint(0, 9, (4, 3))
    order = sort_indices(indices, 9)
    state = (unit(9, 5), torch.zeros(9, 5), torch.zeros(9, 5))
    args = (*state, torch.randn(4, 3), torch.randn(4, 5), *order, 1, 0.5, schedule(1))
    torch.library.opcheck(adam_sparse_rows_op, (*args, 0.9, 0.99, 1e-8, True, None, None))
