"""TopK encoding against the dense reference: values, chosen sets, ties, NaN, gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saesteer.kernels import topk_encode as module
from saesteer.kernels.ops import encode_topk
from saesteer.kernels.topk_encode import (
    select_topk_torch,
    topk_encode_op,
    topk_encode_reference,
)

# batch, d_model, d_sae, k: odd sizes, k = 1, k = d_sae, and (last three) the search by groups,
# which has a remainder of columns in two of them.
SHAPES = [
    (1, 1, 1, 1),
    (3, 41, 50, 5),
    (5, 17, 33, 33),
    (0, 8, 20, 4),
    (7, 3, 192, 2),
    (4, 1000, 331, 3),
    (6, 40, 1027, 15),
]


def problem(
    batch: int, d_model: int, d_sae: int, dtype: torch.dtype, seed: int = 0
) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    return [normal(batch, d_model), normal(d_sae, d_model), normal(d_sae)]


def ranked(pre_acts: Tensor, k: int) -> Tensor:
    """The definition: larger first, then lower index; NaN is 0. Listed by ascending index."""
    clean = torch.where(pre_acts.isnan(), 0, pre_acts).tolist()
    chosen = [sorted(range(len(row)), key=lambda i: (-row[i], i))[:k] for row in clean]
    return torch.tensor([sorted(row) for row in chosen], dtype=torch.int64).view(len(clean), k)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "d_model", "d_sae", "k"), SHAPES)
def test_equals_the_dense_reference(
    batch: int, d_model: int, d_sae: int, k: int, dtype: torch.dtype
) -> None:
    inputs = problem(batch, d_model, d_sae, dtype)
    acts, indices = encode_topk(*inputs, k)
    expected, expected_indices = topk_encode_reference(*(t.double() for t in inputs), k)
    assert acts.dtype == dtype and indices.dtype == torch.int64
    assert torch.equal(indices, expected_indices)
    # float32: sums of up to 1000 products of size 1, each rounded at 6e-8.
    torch.testing.assert_close(acts.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("batch", "d_model", "d_sae", "k"), SHAPES)
def test_gradients_equal_the_dense_reference(batch: int, d_model: int, d_sae: int, k: int) -> None:
    ours = [t.requires_grad_() for t in problem(batch, d_model, d_sae, torch.float64)]
    dense = [t.detach().clone().requires_grad_() for t in ours]
    weight = torch.randn(batch, k, dtype=torch.float64)
    (encode_topk(*ours, k)[0] * weight).sum().backward()
    (topk_encode_reference(*dense, k)[0] * weight).sum().backward()
    for mine, reference in zip(ours, dense, strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad, reference.grad)


def test_gradcheck() -> None:
    inputs = [t.requires_grad_() for t in problem(4, 5, 30, torch.float64)]
    assert torch.autograd.gradcheck(lambda x, W, b: encode_topk(x, W, b, 3)[0], inputs)
    assert torch.autograd.gradgradcheck(lambda x, W, b: encode_topk(x, W, b, 3)[0], inputs)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    d_sae=st.sampled_from([1, 2, 7, 40, 192, 200, 259]),
    k=st.integers(1, 300),
    values=st.sampled_from(
        [
            [0.0, 1.0],
            [1.0, 1.0 + 2**-23, 2.0],
            [-1.0, -0.0, 0.0],
            [math.nan, 1.0, 2.0],
            [math.nan, -1.0, -2.0],
            [math.inf, -math.inf, 0.5, math.nan],
            [1e-45, 2e-45, 0.0],
            [-1.0],
            [math.nan],
        ]
    ),
    seed=st.integers(0, 2**31),
)
def test_selection_is_exact_on_ties_and_odd_values(
    rows: int, d_sae: int, k: int, values: list[float], seed: int
) -> None:
    k = min(k, d_sae)
    random = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(values), (rows, d_sae), generator=random)
    pre_acts = torch.tensor(values)[picks]
    acts, indices = select_topk_torch(pre_acts.clone(), k)
    expected = ranked(pre_acts, k)
    assert torch.equal(indices, expected)
    chosen = pre_acts.gather(1, expected)
    assert torch.equal(acts, torch.where(chosen > 0, chosen, 0))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4),
    d_sae=st.integers(1, 700),
    k=st.integers(1, 40),
    bits=st.sampled_from([2, 8, 24]),
    seed=st.integers(0, 2**31),
)
def test_no_value_left_out_beats_a_chosen_one(
    rows: int, d_sae: int, k: int, bits: int, seed: int
) -> None:
    k = min(k, d_sae)
    random = torch.Generator().manual_seed(seed)
    pre_acts = torch.randn(rows, d_sae, generator=random)
    pre_acts = (pre_acts * 2 ** (bits - 2)).round() / 2 ** (bits - 2)  # few bits: many ties
    acts, indices = select_topk_torch(pre_acts.clone(), k)
    assert (indices[:, 1:] > indices[:, :-1]).all()
    assert torch.equal(acts, pre_acts.gather(1, indices).clamp(min=0))
    lowest_chosen = pre_acts.gather(1, indices).amin(1)
    left_out = pre_acts.scatter(1, indices, -math.inf)
    assert (left_out.amax(1) <= lowest_chosen).all()


def test_integer_inputs_give_the_exact_indices_end_to_end() -> None:
    # Small integers multiply and add without rounding: ties are real ties.
    random = torch.Generator().manual_seed(3)
    x = torch.randint(-1, 2, (16, 6), generator=random).float()
    W = torch.randint(-1, 2, (300, 6), generator=random).float()
    b = torch.zeros(300)
    for k in (1, 4, 33, 300):
        assert torch.equal(encode_topk(x, W, b, k)[1], ranked(x @ W.t(), k))


def test_fewer_than_k_positives_leave_empty_slots_without_gradient() -> None:
    x, W, b = problem(6, 9, 40, torch.float64)
    b = b - 6  # nearly every pre-activation is negative
    inputs = [t.requires_grad_() for t in (x, W, b)]
    acts, indices = encode_topk(*inputs, 8)
    positive = (x @ W.t() + b > 0).sum(1)
    assert (positive < 8).any() and (positive > 0).any()
    assert torch.equal((acts > 0).sum(1), positive)
    assert torch.equal(indices, topk_encode_reference(x, W, b, 8)[1])
    acts.sum().backward()
    used = torch.zeros(40, dtype=torch.bool)
    used[indices[acts > 0]] = True
    assert inputs[2].grad is not None
    assert torch.equal(inputs[2].grad != 0, used)


def test_nan_counts_as_zero() -> None:
    x, W, b = problem(3, 5, 40, torch.float32)
    x[1] = math.nan
    W[7] = math.nan
    acts, indices = encode_topk(x, W, b, 6)
    assert not acts.isnan().any()
    assert not (acts[1] != 0).any() and indices[1].tolist() == list(range(6))
    assert not (acts[indices == 7] != 0).any()
    good = torch.arange(40) != 7
    best = (x[0] @ W[good].t() + b[good]).topk(6).values
    torch.testing.assert_close(acts[0].sort().values, best.sort().values)


def test_infinity_is_chosen_first() -> None:
    x, W, b = problem(2, 5, 40, torch.float32)
    b[11], b[12] = math.inf, -math.inf
    acts, indices = encode_topk(x, W, b, 3)
    assert (indices == 11).any(1).all() and not (indices == 12).any()
    assert acts[indices == 11].isinf().all()


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    # Integers, so that the sizes of the products cannot change their rounding.
    random = torch.Generator().manual_seed(1)
    x = torch.randint(-9, 10, (11, 5), generator=random).double()
    W = torch.randint(-9, 10, (70, 5), generator=random).double()
    b = torch.randint(-9, 10, (70,), generator=random).double()
    whole = encode_topk(x, W, b, 4)
    for rows in (1, 3, 10):
        monkeypatch.setattr(module, "CPU_CHUNK_BYTES", 0)
        monkeypatch.setattr(module, "CPU_CHUNK_ROWS", rows)
        for one, other in zip(whole, encode_topk(x, W, b, 4), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("batch", [1, 2, 7, 100])
@pytest.mark.parametrize("d_sae", [1, 4608, 2**20, 2**26])
def test_chunks_stay_within_the_limit(batch: int, d_sae: int) -> None:
    rows = module.chunk_rows(batch, d_sae, torch.float32, torch.device("cpu"))
    assert 1 <= rows <= batch
    assert rows == 1 or rows * d_sae * 4 <= module.MOST_CPU_CHUNK_BYTES


def test_strided_inputs() -> None:
    x, W, b = problem(6, 10, 50, torch.float64)
    want = encode_topk(x[::2, ::2].contiguous(), W[:, :5].contiguous(), b, 4)
    got = encode_topk(x[::2, ::2], W[:, :5].t().contiguous().t(), b.repeat(2).view(2, 50)[1], 4)
    assert torch.equal(want[1], got[1])
    torch.testing.assert_close(want[0], got[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_ranked_in_float32(dtype: torch.dtype) -> None:
    inputs = [t.requires_grad_() for t in problem(5, 24, 60, dtype)]
    acts, indices = encode_topk(*inputs, 6)
    assert acts.dtype == torch.float32
    expected = topk_encode_reference(*(t.detach().float() for t in inputs), 6)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(acts, expected[0])
    acts.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == dtype for t in inputs)


def test_opcheck() -> None:
    inputs = [t.requires_grad_() for t in problem(3, 5, 12, torch.float32)]
    torch.library.opcheck(topk_encode_op, (*inputs, 4))


def test_the_same_call_gives_the_same_bits() -> None:
    results = []
    for _ in range(2):
        inputs = [t.requires_grad_() for t in problem(30, 16, 400, torch.float32)]
        acts, indices = encode_topk(*inputs, 5)
        acts.square().sum().backward()
        results.append([acts, indices, *(t.grad for t in inputs)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
