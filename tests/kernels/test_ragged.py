"""Examples with different numbers of latents: every op against a dense product written out here."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.kernels.adam_sparse_rows import adam_sparse_rows_op
from saesteer.kernels.decode_mse import decode_mse_op
from saesteer.kernels.gather_dot import gather_dot_op
from saesteer.kernels.ops import (
    LatentOrder,
    adam_schedule,
    adam_sparse_rows_,
    decode_mse,
    gather_dot,
    sort_indices,
    sparse_decode,
    sparse_pair_grads,
    sparse_row_grads,
)
from saesteer.kernels.sparse_decode import sparse_decode_op
from saesteer.kernels.sparse_pair_grads import sparse_pair_grads_op
from saesteer.kernels.sparse_row_grads import sparse_row_grads_op

LENGTHS = [[3, 0, 7, 1], [0, 0], [], [40], [0, 9, 0], [5, 5, 5], [0]]
"""Entries of each example."""
D_SAE, D_OUT, D_IN = 200, 41, 17

# Sums of up to 200 products of size 1, rounded at 6e-8 in float32.
CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.float64: {"rtol": 1e-9, "atol": 1e-10}}

EVERY_LENGTHS = pytest.mark.parametrize("lengths", LENGTHS, ids=str)
EVERY_CHOICE = pytest.mark.parametrize("choice", ["auto", "torch"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


class Problem:
    """Random entries, two matrices and two batches of rows; indices may repeat in an example."""

    def __init__(self, lengths: list[int], dtype: torch.dtype, d_sae: int = D_SAE) -> None:
        random = torch.Generator().manual_seed(len(lengths))

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

        self.lengths, self.d_sae = lengths, d_sae
        batch, n_entries = len(lengths), sum(lengths)
        self.row_starts = torch.tensor([0, *itertools.accumulate(lengths)])
        self.indices = torch.randint(0, d_sae, (n_entries,), generator=random)
        self.acts, self.slots = normal(n_entries).relu(), normal(n_entries)
        self.W, self.bias = normal(d_sae, D_OUT), normal(D_OUT)
        self.target, self.x = normal(batch, D_OUT), normal(batch, D_IN)

    def dense(self, values: Tensor) -> Tensor:
        """`[batch, d_sae]` in float64, one entry after the other."""
        rows = []
        for b, length in enumerate(self.lengths):
            row = torch.zeros(self.d_sae, dtype=torch.float64)
            for at in range(int(self.row_starts[b]), int(self.row_starts[b]) + length):
                one = torch.zeros_like(row)
                one[self.indices[at]] = 1
                row = row + values[at].double() * one
            rows.append(row)
        return torch.stack(rows) if rows else values.new_zeros(0, self.d_sae).double()

    def picked(self, dense: Tensor) -> Tensor:
        """The entries' values out of a `[batch, d_sae]`."""
        owner = [b for b, length in enumerate(self.lengths) for _ in range(length)]
        return dense[torch.tensor(owner, dtype=torch.int64), self.indices]


def compare(
    ours: Callable[..., Any], dense: Callable[..., Any], inputs: list[Tensor], dtype: torch.dtype
) -> None:
    """Outputs, and the gradients by every input of a weighted sum of them."""
    results = []
    for run, kind in ((ours, dtype), (dense, torch.float64)):
        leaves = [t.detach().to(kind).requires_grad_() for t in inputs]
        out = run(*leaves)
        out = [out] if isinstance(out, Tensor) else list(out)
        weighted = [
            t.flatten().double() @ torch.arange(t.numel(), dtype=torch.float64).cos() for t in out
        ]
        loss = torch.stack(weighted).sum() + sum(0 * t.double().sum() for t in leaves)
        results.append([*out, *torch.autograd.grad(loss, leaves)])
    for found, expected in zip(*results, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, **CLOSE[dtype])


@pytest.mark.usefixtures("poisoned_memory")
@EVERY_DTYPE
@EVERY_CHOICE
@EVERY_LENGTHS
def test_decode_and_dot(
    lengths: list[int], choice: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAESTEER_KERNELS", choice)
    p = Problem(lengths, dtype)
    compare(
        lambda acts, W, bias: sparse_decode(acts, p.indices, W, bias, p.row_starts),
        lambda acts, W, bias: p.dense(acts) @ W + bias,
        [p.acts, p.W, p.bias],
        dtype,
    )
    compare(
        lambda rows, W: gather_dot(rows, W, p.indices, p.row_starts),
        lambda rows, W: p.picked(rows @ W.T),
        [p.target, p.W],
        dtype,
    )


@pytest.mark.usefixtures("poisoned_memory")
@EVERY_DTYPE
@EVERY_CHOICE
@EVERY_LENGTHS
# With 9 latents the dense product is cheaper and is taken.
@pytest.mark.parametrize("d_sae", [D_SAE, 9])
def test_decode_mse(
    lengths: list[int],
    choice: str,
    dtype: torch.dtype,
    d_sae: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SAESTEER_KERNELS", choice)
    p = Problem(lengths, dtype, d_sae)

    def dense(acts: Tensor, W: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        error = p.dense(acts) @ W + bias - target
        return error.square().sum(1), error

    compare(
        lambda acts, *rest: decode_mse(acts, p.indices, *rest, p.row_starts)[:2],
        dense,
        [p.acts, p.W, p.bias, p.target],
        dtype,
    )
    slots = decode_mse(p.acts, p.indices, p.W, p.bias, p.target, p.row_starts)[2]
    _, error = dense(p.acts, p.W.double(), p.bias.double(), p.target.double())
    torch.testing.assert_close(slots.double(), p.picked(error @ p.W.double().T), **CLOSE[dtype])


@pytest.mark.usefixtures("poisoned_memory")
@EVERY_DTYPE
@EVERY_LENGTHS
@pytest.mark.parametrize("sorted_before", [False, True])
def test_row_sums(lengths: list[int], dtype: torch.dtype, sorted_before: bool) -> None:
    p = Problem(lengths, dtype)
    order = sort_indices(p.indices, p.d_sae, p.row_starts) if sorted_before else None
    counts = (p.dense((p.acts != 0).double())).sum(0).long()

    def rows_of(weights: Tensor, rows: Tensor) -> Tensor:
        sums, found = sparse_row_grads(weights, p.indices, rows, p.d_sae, order, p.row_starts)
        assert torch.equal(found, counts)
        return sums

    def pairs_of(a: Tensor, rows_a: Tensor, b: Tensor, rows_b: Tensor) -> tuple[Tensor, ...]:
        *sums, found = sparse_pair_grads(
            a, rows_a, b, rows_b, p.indices, p.d_sae, order, p.row_starts
        )
        assert torch.equal(found, counts)
        return tuple(sums)

    compare(rows_of, lambda w, rows: p.dense(w).T @ rows, [p.acts, p.target], dtype)
    compare(
        pairs_of,
        lambda a, rows_a, b, rows_b: (
            p.dense(a).T @ rows_a,
            p.dense(b).T @ rows_b,
            p.dense(b).sum(0),
        ),
        [p.acts, p.target, p.slots, p.x],
        dtype,
    )


@pytest.mark.usefixtures("poisoned_memory")
@EVERY_CHOICE
@EVERY_LENGTHS
def test_the_step_from_entries(
    lengths: list[int], choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAESTEER_KERNELS", choice)
    p = Problem(lengths, torch.float32)
    order = sort_indices(p.indices, p.d_sae, p.row_starts)
    schedule = torch.tensor(adam_schedule(1, 3e-3, 0.9, 0.99), dtype=torch.float64)
    param = p.W.clone()
    state = [param, torch.zeros_like(param), torch.zeros_like(param)]
    sums, counts = adam_sparse_rows_(
        *state, p.acts, p.indices, p.target, order,
        factor=0.5, schedule=schedule, beta1=0.9, beta2=0.99, row_starts=p.row_starts,
    )  # fmt: skip
    reference = p.W.double().requires_grad_()
    adam = torch.optim.Adam([reference], lr=3e-3, betas=(0.9, 0.99))
    reference.grad = 0.5 * p.dense(p.acts).T @ p.target.double()
    adam.step()
    # Adam divides small sums by their own size, rounding and all.
    torch.testing.assert_close(param.double(), reference.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.double(), 0.5 * p.dense(p.acts).sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(counts, p.dense((p.acts != 0).double()).sum(0).long())


@pytest.mark.usefixtures("poisoned_memory")
@EVERY_DTYPE
@EVERY_CHOICE
@pytest.mark.parametrize("lengths", [[3, 0, 7, 1, 5, 0], [0] * 6, []], ids=str)
def test_pieces_of_an_example_share_its_row(
    lengths: list[int], choice: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAESTEER_KERNELS", choice)
    p = Problem(lengths, dtype)
    shared = p.x[: len(lengths) // 3]

    def pairs_of(a: Tensor, rows_a: Tensor, b: Tensor, rows_b: Tensor) -> tuple[Tensor, ...]:
        found = sparse_pair_grads(a, rows_a, b, rows_b, p.indices, p.d_sae, row_starts=p.row_starts)
        return found[:3]

    compare(
        pairs_of,
        lambda a, rows_a, b, rows_b: (
            p.dense(a).T @ rows_a,
            p.dense(b).T @ rows_b.repeat_interleave(3, dim=0),
            p.dense(b).sum(0),
        ),
        [p.acts, p.target, p.slots, shared],
        dtype,
    )
    order = sort_indices(p.indices, p.d_sae, p.row_starts)
    schedule = torch.tensor(adam_schedule(1, 3e-3, 0.9, 0.99), dtype=torch.float64)
    states = []
    for rows in (shared, shared.repeat_interleave(3, dim=0)):
        param = p.W[:, :D_IN].clone()
        state = [param, torch.zeros_like(param), torch.zeros_like(param)]
        sums = adam_sparse_rows_(
            *state, p.slots, p.indices, rows, order,
            factor=0.5, schedule=schedule, row_starts=p.row_starts,
        )  # fmt: skip
        states.append([*state, *sums])
    assert all(map(torch.equal, *states))
    if lengths:
        with pytest.raises(ValueError, match=r"rows_b must be \[batch, d_model\] = \[6, 17\], or"):
            pairs_of(p.acts, p.target, p.slots, p.x[:4])


@EVERY_CHOICE
def test_equal_lengths_give_the_bits_of_the_rectangle(
    choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAESTEER_KERNELS", choice)
    p = Problem([6] * 50, torch.float32)
    schedule = torch.tensor(adam_schedule(1, 3e-3, 0.9, 0.999), dtype=torch.float64)
    results = []
    for shape, row_starts in (((50, 6), None), ((300,), p.row_starts)):
        acts, slots, indices = (t.view(shape) for t in (p.acts, p.slots, p.indices))
        order = sort_indices(indices, p.d_sae, row_starts)
        state = [p.W.clone(), torch.zeros_like(p.W), torch.zeros_like(p.W)]
        found = [
            *order[:2],
            sparse_decode(acts, indices, p.W, p.bias, row_starts),
            gather_dot(p.target, p.W, indices, row_starts),
            *decode_mse(acts, indices, p.W, p.bias, p.target, row_starts),
            *sparse_pair_grads(
                acts, p.target, slots, p.x, indices, p.d_sae, order, row_starts
            ),
            *adam_sparse_rows_(
                *state, acts, indices, p.target, order,
                factor=0.5, schedule=schedule, unit_rows=True, row_starts=row_starts,
            ),
            *state,
        ]  # fmt: skip
        results.append([t.flatten() for t in found])
    for rectangle, ragged in zip(*results, strict=True):
        assert torch.equal(rectangle, ragged)


@EVERY_DTYPE
@pytest.mark.parametrize("ragged", [False, True])
def test_the_error_in_one_pass_and_in_three(ragged: bool, dtype: torch.dtype) -> None:
    p = Problem([3, 0, 7, 1, 9] if ragged else [4] * 5, dtype)
    row_starts = p.row_starts if ragged else None
    shape = (20,) if ragged else (5, 4)
    acts, indices = p.acts.view(shape), p.indices.view(shape)
    fused = decode_mse(acts, indices, p.W, p.bias, p.target, row_starts)
    # A device that holds some of the latents has a part of the sum; the parts are added up.
    mine = indices < p.d_sae // 2
    parts = [
        sparse_decode(torch.where(held, acts, 0), indices, p.W, None, row_starts)
        for held in (mine, ~mine)
    ]
    for decoded in (
        sparse_decode(acts, indices, p.W, p.bias, row_starts),
        parts[0] + parts[1] + p.bias,
    ):
        error = decoded - p.target
        apart = error.square().sum(1), error, gather_dot(error, p.W, indices, row_starts)
        for ours, theirs in zip(fused, apart, strict=True):
            torch.testing.assert_close(ours, theirs, **CLOSE[dtype])


def test_opcheck() -> None:
    p = Problem([3, 0, 7], torch.float32)
    acts, W = p.acts.clone().requires_grad_(), p.W.clone().requires_grad_()
    check = torch.library.opcheck
    check(sparse_decode_op, (acts, p.indices, W, p.bias, p.row_starts))
    check(gather_dot_op, (p.target, W, p.indices, p.row_starts))
    check(decode_mse_op, (acts, p.indices, W, p.bias, p.target, p.row_starts))
    order = sort_indices(p.indices, p.d_sae, p.row_starts)
    check(sparse_row_grads_op, (acts, p.indices, p.target, p.d_sae, p.row_starts, *order))
    pair = (acts, p.target, p.slots, p.x, p.indices, p.d_sae)
    check(sparse_pair_grads_op, (*pair, p.row_starts))
    check(sparse_pair_grads_op, (*pair, p.row_starts, *order))
    state = (p.W, torch.zeros_like(p.W), torch.zeros_like(p.W))
    schedule = torch.tensor(adam_schedule(1, 3e-3, 0.9, 0.999), dtype=torch.float64)
    hyper = (1, 0.5, schedule, 0.9, 0.99, 1e-8, False, None, None)
    check(adam_sparse_rows_op, (*state, p.acts, p.target, *order, *hyper))


@pytest.mark.parametrize(
    ("row_starts", "message"),
    [
        ([0, 3, 3, 9], r"`row_starts` must begin with 0 and end with 10 .*, got 0 and 9"),
        ([1, 3, 3, 10], r"`row_starts` must begin with 0 and end with 10 .*, got 1 and 10"),
        ([0, 7, 3, 10], r"`row_starts` must not fall, got 7 before 3 at 1"),
    ],
)
def test_wrong_row_starts_are_named(row_starts: list[int], message: str) -> None:
    p = Problem([3, 0, 7], torch.float32)
    wrong = torch.tensor(row_starts)
    calls: list[Callable[[], object]] = [
        lambda: sort_indices(p.indices, p.d_sae, wrong),
        lambda: sparse_decode(p.acts, p.indices, p.W, None, wrong),
        lambda: gather_dot(p.target, p.W, p.indices, wrong),
        lambda: decode_mse(p.acts, p.indices, p.W, p.bias, p.target, wrong),
        lambda: sparse_row_grads(p.acts, p.indices, p.target, p.d_sae, None, wrong),
        lambda: sparse_pair_grads(
            p.acts, p.target, p.acts, p.x, p.indices, p.d_sae, None, wrong
        ),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_an_index_out_of_range_is_an_error() -> None:
    p = Problem([3, 0, 7], torch.float32)
    p.indices[4] = D_SAE
    with pytest.raises(IndexError, match=rf"0\.\.{D_SAE - 1} \(d_sae\), got {D_SAE}"):
        gather_dot(p.target, p.W, p.indices, p.row_starts)


def test_an_order_of_the_other_form_is_an_error() -> None:
    p = Problem([2, 2, 2], torch.float32)
    ragged = sort_indices(p.indices, p.d_sae, p.row_starts)
    with pytest.raises(ValueError, match="sorted without `row_starts`"):
        sparse_row_grads(
            p.acts, p.indices, p.target, p.d_sae, LatentOrder(*ragged[:2]), p.row_starts
        )
    with pytest.raises(ValueError, match="sorted with `row_starts`"):
        sparse_row_grads(p.acts.view(3, 2), p.indices.view(3, 2), p.target, p.d_sae, ragged)
    with pytest.raises(TypeError, match="`row_starts` must be int64, got torch.int32"):
        sparse_decode(p.acts, p.indices, p.W, None, p.row_starts.int())
