"""The fused TopK encoder: its certificate, its repair, and its result against the dense reference.

These run the PyTorch twin, which takes the same steps as the kernels.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saesteer.kernels import topk_encode_fused as module
from saesteer.kernels.ops import encode_topk, encode_topk_fused
from saesteer.kernels.topk_certificate import (
    MAX_FLAGGED,
    TILE,
    flag_bound,
    kept_per_tile,
    select_certified,
    tile_count,
    tile_latents,
)
from saesteer.kernels.topk_encode import topk_encode_reference
from saesteer.kernels.topk_encode_fused import encode_topk_fused_op, encode_topk_fused_torch

# batch, d_model, d_sae, k: less than a tile, ragged tiles, whole tiles, k = d_sae, no rows.
SHAPES = [
    (1, 1, 1, 1),
    (3, 41, 50, 5),
    (5, 17, 300, 9),
    (0, 8, 200, 4),
    (4, 1000, 1024, 12),
    (6, 20, 33, 33),
    (2, 7, 129, 1),
]


def problem(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    batch, d_model, d_sae = shape
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random, dtype=torch.float64).to(dtype)

    return [normal(batch, d_model), normal(d_sae, d_model), normal(d_sae)]


def ranked(pre_acts: Tensor, k: int) -> Tensor:
    """The definition: larger first, then lower index; NaN is 0. Listed by ascending index."""
    clean = torch.where(pre_acts.isnan(), 0, pre_acts)
    return torch.sort(clean, dim=1, descending=True, stable=True).indices[:, :k].sort(1).values


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "d_model", "d_sae", "k"), SHAPES)
def test_equals_the_dense_reference(
    batch: int, d_model: int, d_sae: int, k: int, dtype: torch.dtype, strided: bool
) -> None:
    inputs = problem(batch, d_model, d_sae, dtype=dtype)
    acts, indices = encode_topk_fused(*inputs, k, strided=strided)
    expected, expected_indices = topk_encode_reference(*(t.double() for t in inputs), k)
    assert acts.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert indices.dtype == torch.int64
    assert torch.equal(indices, expected_indices)
    # float32: sums of up to 1000 products of size 1, each rounded at 6e-8.
    torch.testing.assert_close(acts.double(), expected, rtol=1e-5, atol=1e-4)


@settings(max_examples=80, deadline=None)
@given(
    d_sae=st.sampled_from([5, 128, 130, 300, 512, 700]),
    k=st.integers(1, 60),
    kept=st.integers(1, 9),
    strided=st.booleans(),
    values=st.sampled_from(
        [
            None,
            [0.0, 1.0],
            [1.0, 1.0 + 2**-23, 2.0],
            [-1.0, -0.0, 0.0],
            [math.nan, 1.0, 2.0],
            [math.inf, -math.inf, 0.5, math.nan],
            [-math.inf],
            [1e-45, 2e-45, 0.0],
            [-1.0],
        ]
    ),
    seed=st.integers(0, 2**31),
)
def test_no_certified_row_is_wrong(
    d_sae: int, k: int, kept: int, strided: bool, values: list[float] | None, seed: int
) -> None:
    widths = (tile_latents(d_sae, strided, torch.device("cpu")) < d_sae).sum(1)
    k = min(k, int(widths.clamp(max=kept).sum()))  # as many as there are candidates
    random = torch.Generator().manual_seed(seed)
    if values is None:
        pre_acts = torch.randn(4, d_sae, generator=random)
    else:
        pre_acts = torch.tensor(values)[torch.randint(0, len(values), (4, d_sae), generator=random)]
    found, indices, flagged = select_certified(pre_acts, k, kept, strided)
    expected = ranked(pre_acts, k)
    good = ~flagged
    assert torch.equal(indices[good], expected[good])
    clean = torch.where(pre_acts.isnan() | (pre_acts == 0), 0, pre_acts)
    assert torch.equal(found[good], clean.gather(1, expected)[good])
    # And no row is flagged without need: some tile gave all its candidates away.
    tiles = torch.empty(d_sae, dtype=torch.int64)
    for tile, latents in enumerate(tile_latents(d_sae, strided, torch.device("cpu"))):
        tiles[latents[latents < d_sae]] = tile
    counts = torch.zeros(4, len(widths), dtype=torch.int64)
    counts.scatter_add_(1, tiles[indices], torch.ones_like(indices))
    assert torch.equal(flagged, ((counts == kept) & (widths > kept)).any(1))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("kept", [1, 2])
def test_flagged_rows_are_repaired(kept: int, strided: bool) -> None:
    # Small integers multiply and add without rounding: every index has to agree, ties included.
    random = torch.Generator().manual_seed(3)
    x = torch.randint(-4, 5, (64, 6), generator=random).float()
    W = torch.randint(-4, 5, (2000, 6), generator=random).float()
    b = torch.zeros(2000)
    k = 12
    pre_acts = x @ W.t()
    _, indices, flagged = select_certified(pre_acts, k, kept, strided)
    assert flagged.float().mean() > 0.9  # forced: 12 of 16 tiles' candidates
    wrong = (indices != ranked(pre_acts, k)).any(1)
    assert wrong.any() and not (wrong & ~flagged).any()
    acts, indices = encode_topk_fused_torch(x, W, b, k, kept, strided)
    assert torch.equal(indices, ranked(pre_acts, k))
    assert torch.equal(acts, pre_acts.gather(1, indices).relu())


def test_dealing_latents_out_saves_sorted_dictionaries() -> None:
    random = torch.Generator().manual_seed(0)
    d_sae, k = 4096, 32
    kept = kept_per_tile(d_sae, k)
    assert kept is not None
    # The first latents fire most, as in a dictionary sorted by frequency.
    pre_acts = torch.randn(100, d_sae, generator=random) + 3 * torch.linspace(1, -1, d_sae)
    flagged = {s: select_certified(pre_acts, k, kept, s)[2].float().mean() for s in (False, True)}
    assert flagged[False] > 0.9 and flagged[True] < 0.05, flagged


@pytest.mark.parametrize(("d_sae", "k", "kept"), [(1024, 16, 5), (1024, 16, 7), (2048, 32, 6)])
def test_flags_are_as_rare_as_the_formula_says(d_sae: int, k: int, kept: int) -> None:
    random = torch.Generator().manual_seed(0)
    n, flags = 20_000, 0
    for _ in range(20):
        flags += int(
            select_certified(torch.rand(n // 20, d_sae, generator=random), k, kept, False)[2].sum()
        )
    bound = flag_bound(d_sae, k, kept)
    sigma = math.sqrt(bound / n)
    # Bonferroni: all tiles' probabilities added up, at most the pairs' subtracted (counts of two
    # tiles are negatively associated: both are full less often than by chance).
    tiles = tile_count(d_sae)
    least = bound - tiles * (tiles - 1) / 2 * (bound / tiles) ** 2
    assert least - 4 * sigma <= flags / n <= bound + 4 * sigma
    assert flags > 0


def test_the_bound_at_reference_sizes() -> None:
    # Exact binomials, at two of the sizes where they are small enough to print.
    def exact(d_sae: int, k: int, kept: int) -> float:
        hits = sum(math.comb(TILE, n) * math.comb(d_sae - TILE, k - n) for n in range(kept, k + 1))
        return d_sae // TILE * hits / math.comb(d_sae, k)

    for d_sae, k, kept in ((16384, 32, 6), (16384, 32, 8), (131072, 64, 4), (131072, 64, 6)):
        assert math.isclose(flag_bound(d_sae, k, kept), exact(d_sae, k, kept), rel_tol=1e-6)
    for d_sae, k in ((16384, 32), (131072, 64), (24576, 32), (65536, 64), (9216, 32)):
        kept = kept_per_tile(d_sae, k)
        assert kept is not None and flag_bound(d_sae, k, kept) <= MAX_FLAGGED
        assert flag_bound(d_sae, k, kept - 1) > MAX_FLAGGED


@pytest.mark.parametrize(("d_sae", "k"), [(1, 1), (40, 40), (129, 129), (1000, 500), (2**23, 64)])
def test_there_are_always_enough_candidates(d_sae: int, k: int) -> None:
    kept = kept_per_tile(d_sae, k)
    if kept is None:
        return
    for strided in (False, True):
        widths = (tile_latents(d_sae, strided, torch.device("cpu")) < d_sae).sum(1)
        assert int(widths.clamp(max=kept).sum()) >= k


@settings(max_examples=60, deadline=None)
@given(d_sae=st.integers(1, 3000), k=st.integers(1, 200))
def test_candidates_suffice_at_any_size(d_sae: int, k: int) -> None:
    kept = kept_per_tile(d_sae, min(k, d_sae))
    for strided in (False, True):
        latents = tile_latents(d_sae, strided, torch.device("cpu"))
        present = latents[latents < d_sae]
        assert torch.equal(present.sort().values, torch.arange(d_sae))
        if kept is not None:
            widths = (latents < d_sae).sum(1)
            assert int(widths.clamp(max=kept).sum()) >= min(k, d_sae)


def test_rows_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(1)
    x = torch.randint(-9, 10, (11, 5), generator=random).double()
    W = torch.randint(-9, 10, (300, 5), generator=random).double()
    b = torch.randint(-9, 10, (300,), generator=random).double()
    monkeypatch.setattr(module, "TWIN_BYTES", 3 * 384 * 8)
    for one, other in zip(encode_topk_fused(x, W, b, 4), encode_topk(x, W, b, 4), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(4, 6, 300, 7), (0, 3, 140, 2), (3, 5, 20, 20)])
def test_gradients_equal_the_dense_reference(shape: tuple[int, ...]) -> None:
    *sizes, k = shape
    ours = [t.requires_grad_() for t in problem(*sizes, dtype=torch.float64)]
    dense = [t.detach().clone().requires_grad_() for t in ours]
    weight = torch.randn(shape[0], k, dtype=torch.float64)
    (encode_topk_fused(*ours, k)[0] * weight).sum().backward()
    (topk_encode_reference(*dense, k)[0] * weight).sum().backward()
    for mine, reference in zip(ours, dense, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad)


def test_gradcheck() -> None:
    inputs = [t.requires_grad_() for t in problem(2, 4, 140, dtype=torch.float64)]
    assert torch.autograd.gradcheck(
        lambda x, W, b: encode_topk_fused(x, W, b, 3)[0], inputs, fast_mode=True
    )


def test_empty_slots_and_nan() -> None:
    x, W, b = problem(6, 9, 300, dtype=torch.float64)
    b = b - 12  # nearly every pre-activation is negative
    x[2] = math.nan
    b.requires_grad_()
    acts, indices = encode_topk_fused(x, W, b, 8)
    expected, expected_indices = topk_encode_reference(x, W, b.detach(), 8)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(acts, expected)
    assert ((acts > 0).sum(1) < 8).any() and indices[2].tolist() == list(range(8))
    acts.sum().backward()
    used = torch.zeros(300, dtype=torch.bool)
    used[indices[acts > 0]] = True
    assert b.grad is not None and torch.equal(b.grad != 0, used)


def test_strided_and_mixed_inputs() -> None:
    x, W, b = problem(6, 10, 200, dtype=torch.float64)
    want = encode_topk_fused(x[::2, ::2].contiguous(), W[:, :5].contiguous(), b, 4)
    got = encode_topk_fused(x[::2, ::2], W[:, :5].t().contiguous().t(), b, 4)
    assert torch.equal(want[1], got[1])
    acts, _ = encode_topk_fused(x.float(), W.bfloat16(), b, 4)
    assert acts.dtype == torch.float32


def test_wrong_arguments_are_named() -> None:
    x, W, b = problem(2, 3, 6)
    function = getattr(encode_topk_fused, "__wrapped__", encode_topk_fused)
    with pytest.raises(ValueError, match=r"k must be in 1\.\.6 \(d_sae\), got 7"):
        function(x, W, b, 7)
    with pytest.raises(ValueError, match=r"b_enc must be \[d_sae\] = \[6\], got \[2, 3\]"):
        function(x, W, x, 2)


def test_opcheck() -> None:
    inputs = [t.requires_grad_() for t in problem(3, 5, 140)]
    torch.library.opcheck(encode_topk_fused_op, (*inputs, 4, True))
