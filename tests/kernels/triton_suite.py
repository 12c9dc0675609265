"""The Triton kernels against the dense references. Run by test_triton.py in a process of its own.

With ``TRITON_INTERPRET=1`` the kernels run on the CPU, one program after the other at about 0.1 ms
each and slower for long ones: the problems are tiny. Without it they are compiled and run on CUDA.
"""

import itertools
import math
import os

import pytest
import torch
from torch import Tensor

os.environ["SAESTEER_KERNELS"] = "triton"

from saesteer.kernels import (
    adam_rows,
    auxk,
    batchtopk_encode,
    decode_mse,
    decode_prefixes,
    ops,
    select_largest,
    sparse_decode,
    sparse_row_grads,
    topk_encode,
)
from saesteer.kernels import gather_dot as dots
from saesteer.kernels.adam_rows import adam_rows_reference, adam_rows_torch, adam_schedule
from saesteer.kernels.dispatch import INTERPRETED
from saesteer.kernels.sparse_pair_grads import sparse_pair_grads_reference
from saesteer.kernels.threshold_encode import at_capacity, threshold_encode_torch
from saesteer.kernels.threshold_grads import threshold_grads_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cpu" if INTERPRETED else "cuda"

# batch, d_model, d_sae, k. About 80 entries per latent in the last: more than CHUNK, so its sums
# are made in parts.
SHAPES = [(1, 1, 1, 1), (3, 41, 20, 5), (2, 1000, 12, 12), (0, 8, 20, 4), (20, 7, 2, 8)]
WIDE = [] if INTERPRETED else [(300, 576, 4608, 32), (64, 1100, 40000, 64), (2000, 64, 512, 8)]

# float32 sums of up to 1000 products of size 1, each rounded at 6e-8.
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64).to(DEVICE, dtype)


def integers(high: int, *shape: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, high, shape, generator=random).to(DEVICE)


def rows_far_apart(values: Tensor) -> Tensor:
    """The two rows of ``values``, 2**31 elements apart: an offset in 32 bits misses the second."""
    try:
        far = torch.zeros(1, dtype=values.dtype, device=DEVICE)
        far.untyped_storage().resize_((2**31 + values.shape[1]) * values.element_size())
    except RuntimeError as error:
        pytest.skip(f"no room for 2**31 elements: {str(error).splitlines()[0]}")
    far = far.as_strided(values.shape, (2**31, 1))  # pages that are never touched take no memory
    return far.copy_(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("batch", "d_model", "d_sae", "k"), SHAPES + WIDE)
def test_linear_ops(batch: int, d_model: int, d_sae: int, k: int, dtype: torch.dtype) -> None:
    weights, rows = normal(batch, k), normal(batch, d_model, seed=1, dtype=dtype)
    weights = weights.double() if dtype == torch.float64 else weights
    matrix, bias = normal(d_sae, d_model, seed=2, dtype=dtype), normal(d_model, seed=3)
    indices = integers(d_sae, batch, k)
    wide = [t.double() for t in (weights, rows, matrix, bias)]

    out = sparse_decode.sparse_decode_triton(weights, indices, matrix, bias)
    expected = sparse_decode.sparse_decode_reference(wide[0], indices, wide[2], wide[3])
    torch.testing.assert_close(out.double(), expected, **CLOSE)
    torch.testing.assert_close(
        sparse_decode.sparse_decode_triton(weights, indices, matrix, None).double(),
        expected - wide[3],
        **CLOSE,
    )

    out = dots.gather_dot_triton(rows, matrix, indices)
    expected = dots.gather_dot_reference(wide[1], wide[2], indices)
    torch.testing.assert_close(out.double(), expected, **CLOSE)

    order = sparse_row_grads.sort_indices(indices, d_sae)
    sums = sparse_row_grads.sparse_row_grads_triton(weights, rows, order)
    expected = sparse_row_grads.sparse_row_grads_reference(wide[0], indices, wide[1], d_sae)
    for got, want in zip(sums, expected, strict=True):
        torch.testing.assert_close(got.double(), want.double(), **CLOSE)
    again = sparse_row_grads.sparse_row_grads_triton(weights, rows, order)
    assert all(torch.equal(a, b) for a, b in zip(sums, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("batch", "d_model", "d_sae", "k"),
    [(1, 1, 1, 1), (3, 41, 50, 5), (2, 30, 33, 33), (0, 8, 20, 4), (2, 20, 700, 9), *WIDE],
)
def test_encoding(batch: int, d_model: int, d_sae: int, k: int, dtype: torch.dtype) -> None:
    # Small integers: products and sums are exact, ties are many, and every index has to agree.
    x = (integers(9, batch, d_model) - 4).to(dtype)
    W, b = (integers(9, d_sae, d_model, seed=1) - 4).to(dtype), integers(5, d_sae).to(dtype)
    acts, indices = ops.encode_topk(x, W, b, k)
    expected, expected_indices = topk_encode.topk_encode_reference(
        x.double(), W.double(), b.double(), k
    )
    assert torch.equal(indices, expected_indices)
    assert torch.equal(acts.double(), expected)
    assert acts.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


ODD = [
    [0.0, 1.0],
    [-1.0, -0.0, 0.0],
    [math.nan, -1.0, 2.0],
    [math.inf, -math.inf, 0.5, math.nan],
    [1e-45, 2e-45, 0.0, -1e-45],
    [1.0, 1.0 + 2**-23],
    [math.nan],
    [-3.0, -3.0 - 2**-22],
]


@pytest.mark.parametrize("values", ODD, ids=str)
@pytest.mark.parametrize(("d_sae", "k"), [(7, 3), (300, 20), (40, 40)])
def test_selection_on_ties_and_odd_values(values: list[float], d_sae: int, k: int) -> None:
    pre_acts = torch.tensor(values, device=DEVICE)[integers(len(values), 2, d_sae)]
    acts, indices = pre_acts.new_empty(2, k), integers(1, 2, k)
    bias = torch.zeros(d_sae, device=DEVICE)
    topk_encode.select_topk_triton(pre_acts, bias, k, acts, indices)
    clean = pre_acts.masked_fill(pre_acts.isnan(), 0)
    ranked = torch.sort(clean, dim=1, descending=True, stable=True).indices[:, :k]
    expected = ranked.sort(1).values
    assert torch.equal(indices, expected)
    assert torch.equal(acts, clean.gather(1, expected).relu())


@pytest.mark.parametrize("values", ODD, ids=str)
@pytest.mark.parametrize(("width", "k"), [(7, 3), (300, 20), (5, 1)])
def test_the_largest_are_kept(values: list[float], width: int, k: int) -> None:
    pre_acts = torch.tensor(values, device=DEVICE)[integers(len(values), 2, width)]
    clean = torch.where(pre_acts > 0, pre_acts, 0)
    first = torch.sort(clean, dim=1, descending=True, stable=True).indices[:, :k]
    expected = torch.zeros_like(clean).scatter(1, first, clean.gather(1, first))
    assert torch.equal(auxk.keep_largest_(pre_acts, k), expected)


def test_strided_inputs() -> None:
    weights, rows, matrix = normal(5, 4), normal(5, 18, seed=1), normal(9, 18, seed=2)
    indices = integers(9, 5, 4)
    order = sparse_row_grads.sort_indices(indices, 9)

    def run(w: Tensor, r: Tensor, m: Tensor, i: Tensor) -> list[Tensor]:
        return [
            sparse_decode.sparse_decode_triton(w, i, m, None),
            dots.gather_dot_triton(r, m, i),
            *sparse_row_grads.sparse_row_grads_triton(w, r, order),
        ]

    plain = run(weights, rows, matrix, indices)
    views = [
        [t.t().contiguous().t() for t in (weights, rows, matrix, indices)],
        [t.repeat(1, 2)[:, : t.shape[1]] for t in (weights, rows, matrix, indices)],
    ]
    for view in views:
        assert all(torch.equal(a, b) for a, b in zip(plain, run(*view), strict=True))
    one = rows[:1, :1].expand(5, 18)
    full = run(weights, one.contiguous(), matrix, indices)
    assert all(
        torch.equal(a, b) for a, b in zip(full, run(weights, one, matrix, indices), strict=True)
    )


def test_addresses_beyond_32_bits() -> None:
    values = normal(2, 20, dtype=torch.bfloat16)
    far = rows_far_apart(values)
    weights, indices = torch.ones(2, 1, device=DEVICE), torch.tensor([[1], [0]], device=DEVICE)
    order = sparse_row_grads.sort_indices(indices, 2)
    decoded = sparse_decode.sparse_decode_triton(weights, indices, far, None)
    assert torch.equal(decoded, values.flip(0).float())
    both = values.float()
    torch.testing.assert_close(
        dots.gather_dot_triton(far, far, indices)[:, 0], (both * both.flip(0)).sum(1)
    )
    grads, _, _ = sparse_row_grads.sparse_row_grads_triton(weights, far, order)
    assert torch.equal(grads, both.flip(0))


def test_pre_activations_beyond_32_bits() -> None:
    values = normal(2, 20)
    far = rows_far_apart(values)
    bias = torch.zeros(20, device=DEVICE)
    results = []
    for pre_acts in (values, far):
        acts, indices = values.new_empty(2, 3), integers(1, 2, 3)
        topk_encode.select_topk_triton(pre_acts, bias, 3, acts, indices)
        results.append((acts, indices))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("batch", "d_model", "d_sae", "k"), SHAPES + WIDE)
def test_decode_mse(batch: int, d_model: int, d_sae: int, k: int, dtype: torch.dtype) -> None:
    acts, indices = normal(batch, k).relu(), integers(d_sae, batch, k)
    operands = [acts, indices, normal(d_sae, d_model, seed=1, dtype=dtype)]
    operands += [normal(d_model, seed=2, dtype=dtype), normal(batch, d_model, seed=3, dtype=dtype)]
    wide = [t if t.dtype == torch.int64 else t.double() for t in operands]
    for ours, dense in zip(
        ops.decode_mse(*operands), decode_mse.decode_mse_reference(*wide), strict=True
    ):
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert ours._base is None, "a view of a larger result may not be changed in place"
        # Sums of up to 1000 squares of size 30.
        torch.testing.assert_close(ours.double(), dense, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "d_model", "d_sae", "k"), SHAPES + WIDE)
def test_pair_grads(batch: int, d_model: int, d_sae: int, k: int, dtype: torch.dtype) -> None:
    operands = [normal(batch, k).relu(), normal(batch, d_model, seed=1, dtype=dtype)]
    # The second matrix may have another width.
    operands += [normal(batch, k, seed=2), normal(batch, d_model // 2 + 1, seed=3, dtype=dtype)]
    indices = integers(d_sae, batch, k)
    wide = sparse_pair_grads_reference(*(t.double() for t in operands), indices, d_sae)
    found = ops.sparse_pair_grads(*operands, indices, d_sae)
    for ours, dense in zip(found[:3], wide[:3], strict=True):
        assert ours._base is None, "a view of a larger result may not be changed in place"
        torch.testing.assert_close(ours.double(), dense, rtol=1e-4, atol=1e-3)
    assert torch.equal(found[3], wide[3])


LENGTHS = [[3, 0, 7, 1], [0, 0], [], [40], [0, 130, 5]]
"""Entries of each example. Of 130 entries on 2 latents each has more than CHUNK."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_ragged(lengths: list[int], dtype: torch.dtype) -> None:
    batch, d_model, n_entries = len(lengths), 41, sum(lengths)
    d_sae = 2 if n_entries > 100 else 9
    row_starts = torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE)
    acts, indices = normal(n_entries), integers(d_sae, n_entries)
    acts[::3] = 0
    W, bias = normal(d_sae, d_model, seed=1, dtype=dtype), normal(d_model, seed=2, dtype=dtype)
    target = normal(batch, d_model, seed=3, dtype=dtype)
    wide = [t.double() for t in (acts, W, bias, target)]

    decoded = sparse_decode.sparse_decode_triton(acts, indices, W, bias, row_starts)
    expected = sparse_decode.sparse_decode_reference(wide[0], indices, *wide[1:3], row_starts)
    torch.testing.assert_close(decoded.double(), expected, **CLOSE)

    dotted = dots.gather_dot_triton(target, W, indices, row_starts)
    expected = dots.gather_dot_reference(wide[3], wide[1], indices, row_starts)
    torch.testing.assert_close(dotted.double(), expected, **CLOSE)

    found = decode_mse.decode_mse_triton(acts, indices, W, bias, target, row_starts)
    dense = decode_mse.decode_mse_reference(wide[0], indices, *wide[1:], row_starts)
    for ours, theirs in zip(found, dense, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-3)

    # One row for two examples, where they are an even number.
    rows_b = normal(batch // 2 if batch % 2 == 0 else batch, 20, seed=4)
    operands, other = (acts, target, acts.square(), rows_b), wide[0].square()
    sums = ops.sparse_pair_grads(*operands, indices, d_sae, row_starts=row_starts)
    dense_sums = sparse_pair_grads_reference(
        wide[0], wide[3], other, operands[3].double(), indices, d_sae, row_starts
    )
    for ours, theirs in zip(sums, dense_sums, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("n_keys", "high", "count"),
    [(1, 2, 1), (5000, 3, 100), (5000, 2**31, 700), (5000, 9, 5000), (10, 5, 20), (0, 5, 3)],
)
def test_places_of_the_largest(n_keys: int, high: int, count: int, dtype: torch.dtype) -> None:
    keys = (integers(2 * high, n_keys) - high).clamp(max=2**31 - 1).to(dtype)
    if dtype == torch.int64:
        keys = keys << 31
    values, places = torch.sort(keys, descending=True, stable=True)
    places = places[:count][values[:count] > 0].sort().values
    expected = torch.cat([places, places.new_full((count - len(places),), -1)])
    assert torch.equal(select_largest.places_of_largest(keys, count), expected)


def test_the_search_over_several_lists_needs_their_counts_alone() -> None:
    keys = integers(5000, 6000).to(torch.int32)
    parts, count = keys.split([1000, 4000, 1000]), 777
    sought = select_largest.start_search(count, keys.device)
    for shift, width in ((23, 8), (15, 8), (7, 8), (0, 7)):
        counts = [select_largest.count_digits(part, sought, shift, width) for part in parts]
        select_largest.narrow(torch.stack(counts).sum(0, dtype=torch.int32), sought, shift, width)
    assert torch.equal(sought, select_largest.kth_largest(keys, count))
    assert int(sought[0]) == int(keys.sort(descending=True).values[count - 1])


# batch, d_model, d_sae, k, rows a chunk.
BATCHES = [(1, 1, 1, 1, 9), (5, 41, 60, 7, 3), (2, 1000, 17, 17, 9), (0, 8, 20, 4, 9)]
WIDE_BATCHES = [] if INTERPRETED else [(300, 576, 4608, 32, 0), (2000, 64, 40000, 8, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("batch", "d_model", "d_sae", "k", "rows"), BATCHES + WIDE_BATCHES)
def test_selection_of_a_whole_batch(
    batch: int,
    d_model: int,
    d_sae: int,
    k: int,
    rows: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if rows:
        monkeypatch.setattr(topk_encode, "chunk_rows", lambda *_: rows)
    # Small integers: products and sums are exact, ties are many, and every index has to agree.
    x = (integers(5, batch, d_model) - 2).to(dtype)
    W, bias = (integers(5, d_sae, d_model, seed=1) - 2).to(dtype), integers(5, d_sae, seed=2)
    # Many positive, fewer than asked for, none.
    for shift in (0, -2 * d_model if d_model < 100 else -90, -(10**6)):
        operands = [x, W, (bias + shift).to(torch.float64)]
        found = ops.encode_batchtopk(x, W, operands[2].float(), k)
        wanted = batchtopk_encode.batchtopk_encode_reference(*(t.double() for t in operands), k)
        assert torch.equal(found[0].double(), wanted[0])
        assert torch.equal(found[1], wanted[1]) and torch.equal(found[2], wanted[2])
        if shift == -(10**6):
            continue  # nothing above any floor: as the last capacity of the others
        floors = integers(5, d_sae, seed=3).float() + 0.5
        dense = threshold_encode_torch(*(t.double() for t in operands), floors.double())
        for capacity in (batch * d_sae // 3, batch * d_sae):
            entries = ops.encode_above(x, W, operands[2].float(), floors, capacity)
            expected = at_capacity(dense, floors.double(), capacity)
            assert torch.equal(entries[0].double(), expected[0])
            assert torch.equal(entries[1], expected[1]) and torch.equal(entries[2], expected[2])


@pytest.mark.parametrize("values", ODD, ids=str)
@pytest.mark.parametrize(("d_sae", "k"), [(7, 3), (100, 20)])
def test_selection_of_a_batch_on_odd_values(values: list[float], d_sae: int, k: int) -> None:
    pre_acts = torch.tensor(values, device=DEVICE)[integers(len(values), 3, d_sae)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk_encode, "products", lambda x, W: pre_acts)
        x, W = pre_acts.new_zeros(3, 2), pre_acts.new_zeros(d_sae, 2)
        found = batchtopk_encode.batchtopk_encode_triton(x, W, W[:, 0], k)
    clean = torch.where(pre_acts > 0, pre_acts, 0).flatten()
    places = torch.sort(clean, descending=True, stable=True).indices[: 3 * k].sort().values
    assert torch.equal(found[0], clean[places])
    assert torch.equal(found[1], places % d_sae)
    assert torch.equal(
        found[2],
        torch.searchsorted(places, integers(1, 4) + d_sae * torch.arange(4, device=DEVICE)),
    )


def test_pre_activations_of_a_batch_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    values = normal(2, 50)
    results = []
    for pre_acts in (values, rows_far_apart(values)):
        monkeypatch.setattr(topk_encode, "products", lambda x, W, found=pre_acts: found)
        x, W = values.new_zeros(2, 3), values.new_zeros(50, 3)
        results.append(batchtopk_encode.batchtopk_encode_triton(x, W, W[:, 0], 5))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("batch", "levels", "d_model"), [(5, 3, 41), (1, 2, 1000), (0, 2, 8)])
def test_decode_prefixes(batch: int, levels: int, d_model: int, dtype: torch.dtype) -> None:
    lengths = integers(4, batch * levels)  # some pieces have no entries
    lengths[:1] = 40
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    n_entries, d_sae = int(starts[-1]), 60
    operands = [normal(n_entries).relu(), integers(d_sae, n_entries)]
    operands += [normal(d_sae, d_model, seed=1, dtype=dtype), normal(d_model, seed=2, dtype=dtype)]
    operands += [normal(batch, d_model, seed=3, dtype=dtype), starts]
    wide = [t.double() if t.is_floating_point() else t for t in operands]
    found = ops.decode_prefixes(*operands, levels)
    wanted = decode_prefixes.decode_prefixes_reference(*wide, levels)
    for ours, dense in zip(found, wanted, strict=True):
        assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert ours._base is None, "a view of a larger result may not be changed in place"
        # Sums over six levels of up to 1000 squares of size 30.
        torch.testing.assert_close(ours.double(), dense, rtol=1e-5, atol=1e-2)
    again = ops.decode_prefixes(*operands, levels)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_rows_of_prefixes_beyond_32_bits() -> None:
    values = normal(2, 20)
    operands = [normal(3).relu(), integers(2, 3)]
    rest = [normal(20, seed=2), normal(2, 20, seed=3), torch.tensor([0, 1, 1, 2, 3], device=DEVICE)]
    plain = ops.decode_prefixes(*operands, values, *rest, 2)
    far = decode_prefixes.decode_prefixes_triton(*operands, rows_far_apart(values), *rest, 2)
    assert all(torch.equal(a, b) for a, b in zip(plain, far, strict=True))


@pytest.mark.parametrize("to_input", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "d_sae"), [(3, 41), (200, 2), (1, 300), (0, 5)])
def test_threshold_grads(batch: int, d_sae: int, dtype: torch.dtype, to_input: bool) -> None:
    pre_acts, up = normal(batch, d_sae, dtype=dtype), normal(batch, d_sae, seed=1, dtype=dtype)
    thresholds = normal(d_sae, seed=2, dtype=dtype).abs()
    above = pre_acts > thresholds - 0.4
    above[:1] = False  # an example without entries
    places = above.flatten().nonzero()[:, 0]
    starts = torch.searchsorted(places, torch.arange(batch + 1, device=DEVICE) * d_sae)
    dense = torch.where(above, pre_acts, -9)
    for price in (up.new_tensor(0.3), up.square()):
        wanted = threshold_grads_reference(
            dense.double(), thresholds.double(), up.double(), price.double(), 0.8, to_input
        )
        found = ops.threshold_grads(
            pre_acts[above], places % d_sae, thresholds, up[above],
            price if price.dim() == 0 else price[above], 0.8, None, starts, to_input=to_input,
        )  # fmt: skip
        torch.testing.assert_close(found[0].double(), wanted[0][above], **CLOSE)
        torch.testing.assert_close(found[1].double(), wanted[1], **CLOSE)


@pytest.mark.parametrize(("batch", "d_model", "d_sae", "k"), [(3, 41, 70, 4), *WIDE[:1]])
def test_all_gradients_of_a_batch(batch: int, d_model: int, d_sae: int, k: int) -> None:
    inputs = [normal(batch, d_model), normal(d_sae, d_model, seed=1), normal(d_sae, seed=2)]
    inputs += [normal(d_sae, d_model, seed=3), normal(d_model, seed=4)]
    results = []
    for leaves in (inputs, [t.double() for t in inputs]):
        leaves = [t.clone().requires_grad_() for t in leaves]
        double = leaves[0].dtype == torch.float64
        encode = batchtopk_encode.batchtopk_encode_reference if double else ops.encode_batchtopk
        acts, indices, starts = encode(*leaves[:3], k)
        args = (acts, indices, *leaves[3:], leaves[0].detach(), starts)
        loss = decode_mse.decode_mse_reference(*args) if double else ops.decode_mse(*args)
        results.append(torch.autograd.grad(loss[0].sum(), leaves))
    for mine, dense in zip(*results, strict=True):
        torch.testing.assert_close(mine.double(), dense, rtol=1e-4, atol=2e-2)


@pytest.mark.parametrize("candidate", range(1, 4))
def test_every_tile_that_may_be_chosen(candidate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sparse_decode, decode_mse, sparse_row_grads):
        assert len(module.TILES) == 4
        monkeypatch.setattr(module, "TILES", module.TILES[candidate:])
    test_linear_ops(2, 700, 12, 12, torch.bfloat16)
    test_decode_mse(2, 700, 12, 12, torch.bfloat16)
    test_pair_grads(20, 7, 2, 8, torch.float32)


@pytest.mark.parametrize("unit_rows", [False, True])
def test_adam_with_a_scale_a_shadow_and_half_moments(unit_rows: bool) -> None:
    """Against the PyTorch twin, whose random bits are the same."""
    states = []
    for run in (adam_rows.adam_rows_triton, adam_rows_torch):
        param = torch.nn.functional.normalize(normal(5, 41), dim=1)
        shadow = torch.zeros_like(param, dtype=torch.bfloat16)
        moments = [torch.zeros_like(shadow), torch.zeros_like(shadow)]
        scale = torch.tensor(0.25, device=DEVICE)
        for step in range(1, 6):
            schedule = torch.tensor(adam_schedule(step, 3e-3, 0.9, 0.99)).to(DEVICE)
            grad = normal(5, 41, seed=step)
            run(param, grad, *moments, shadow, schedule, scale, 0.9, 0.99, 1e-8, unit_rows)
        assert torch.equal(shadow, param.bfloat16())
        before = param.clone()
        nan = torch.tensor(torch.nan, device=DEVICE)
        run(param, grad, *moments, shadow, schedule, nan, 0.9, 0.99, 1e-8, unit_rows)
        assert torch.equal(param, before)
        states.append((param, *(m.float() for m in moments)))
    # A float32 rounding before a random one may carry a moment to the other neighbour.
    for ours, theirs in zip(*states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-3)
    for ours, theirs in list(zip(*states, strict=True))[1:]:
        assert (ours == theirs).float().mean() > 0.9, "the same random bits"


@pytest.mark.parametrize("unit_rows", [False, True])
@pytest.mark.parametrize("shape", [(5, 41), (2, 1000), (1, 1), (0, 4)])
def test_adam(shape: tuple[int, int], unit_rows: bool) -> None:
    param = torch.nn.functional.normalize(normal(*shape), dim=1)
    if shape[0] > 3:
        param[3] = 0
    if not unit_rows:
        param = param.flatten()  # one axis
    reference = param.double().clone()
    adam = torch.optim.Adam([reference], lr=3e-3, betas=(0.9, 0.99))
    moments = torch.zeros_like(param), torch.zeros_like(param)
    for step in range(1, 21):
        grad = normal(*param.shape, seed=step)
        schedule = torch.tensor(adam_schedule(step, 3e-3, 0.9, 0.99)).to(DEVICE)
        ops.adam_rows_(
            param, grad, *moments, schedule=schedule, beta1=0.9, beta2=0.99, unit_rows=unit_rows
        )
        adam_rows_reference(reference, grad.double(), adam, unit_rows)
    # 20 steps, each of which rounds a parameter of size 1 at 6e-8.
    torch.testing.assert_close(param.double(), reference, rtol=3e-6, atol=3e-6)
    for ours, theirs in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
        torch.testing.assert_close(
            ours.double(), adam.state[reference][theirs], rtol=3e-6, atol=3e-6
        )
    if unit_rows and shape[0] > 3:
        assert not param[3].any()


@pytest.mark.parametrize(("batch", "d_model", "d_sae", "k"), [(3, 41, 30, 4), *WIDE[:1]])
def test_all_gradients(batch: int, d_model: int, d_sae: int, k: int) -> None:
    W, b = normal(d_sae, d_model, seed=1), normal(d_sae, seed=2)
    W_dec, b_dec = normal(d_sae, d_model, seed=3), normal(d_model, seed=4)
    inputs = [t.requires_grad_() for t in (normal(batch, d_model), W, b, W_dec, b_dec)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    acts, indices = ops.encode_topk(*inputs[:3], k)
    # The sum has a gradient of stride 0.
    ours = torch.autograd.grad(ops.sparse_decode(acts, indices, *inputs[3:]).sum(), inputs)
    acts, indices = topk_encode.topk_encode_reference(*wide[:3], k)
    out = sparse_decode.sparse_decode_reference(acts, indices, *wide[3:])
    for mine, dense in zip(ours, torch.autograd.grad(out.sum(), wide), strict=True):
        torch.testing.assert_close(mine.double(), dense, rtol=1e-4, atol=1e-3)


def test_gradcheck_of_the_kernels_in_float64() -> None:
    x, W = normal(2, 3, dtype=torch.float64), normal(6, 3, seed=1, dtype=torch.float64)
    W_dec = normal(6, 3, seed=2, dtype=torch.float64)
    b = torch.zeros(6, dtype=torch.float64, device=DEVICE)

    def run(x: Tensor, W: Tensor, W_dec: Tensor) -> Tensor:
        acts, indices = ops.encode_topk(x, W, b, 2)
        return ops.sparse_decode(acts, indices, W_dec)

    inputs = [t.requires_grad_() for t in (x, W, W_dec)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_wide_selections_fall_back_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk_encode, "MAX_CANDIDATES", 16)
    monkeypatch.setattr(topk_encode, "topk_encode_triton", None)
    x, W, b = normal(2, 3), normal(90, 3), normal(90)
    assert torch.equal(
        ops.encode_topk(x, W, b, 30)[1], topk_encode.topk_encode_reference(x, W, b, 30)[1]
    )
