"""The compiled CPU selection, above all that latents ruled out in bfloat16 had no chance."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("numba", reason="numba is not installed")

from saesteer.kernels import near_products, topk_encode
from saesteer.kernels.topk_encode import topk_encode_native, topk_encode_reference


def encode(
    x: Tensor, W: Tensor, b: Tensor, k: int, certain: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    monkeypatch.setattr(near_products, "fast_bfloat16", lambda: certain)
    monkeypatch.setattr(near_products, "LEAST_ROWS", 1)
    return topk_encode_native(x, W, b, k)


def exact(x: Tensor, W: Tensor, b: Tensor, k: int, acts: Tensor, indices: Tensor) -> None:
    """The chosen set is a best one, up to the rounding of float32 sums, and the values are true."""
    true = x.double() @ W.double().t() + b.double()
    sizes = x.double().abs() @ W.double().abs().t() + b.double().abs() + 1e-30
    # Each of d_model products and sums rounded at 6e-8, twice (here and for the row beside it).
    slack = 2 * (x.shape[1] + 8) * 6e-8 * sizes
    assert (indices.diff(dim=1) > 0).all(), "ascending, so distinct"
    chosen = torch.zeros_like(true, dtype=torch.bool).scatter(1, indices, True)
    worst = torch.where(chosen, true + slack, torch.inf).amin(1)
    best_left = torch.where(chosen, -torch.inf, true - slack).amax(1)
    assert (worst >= best_left).all()
    error = (acts.double() - true.gather(1, indices).relu()).abs()
    assert (error <= slack.gather(1, indices)).all()


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 20),
    d_model=st.sampled_from([64, 65, 100, 576]),
    k=st.integers(1, 9),
    groups=st.integers(16, 70),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["normal", "small", "huge", "mixed", "close", "sparse"]),
)
def test_nothing_that_belongs_is_ruled_out(
    batch: int, d_model: int, k: int, groups: int, seed: int, kind: str
) -> None:
    random = torch.Generator().manual_seed(seed)
    d_sae = k * groups + seed % 7
    x = torch.randn(batch, d_model, generator=random)
    W = torch.randn(d_sae, d_model, generator=random)
    b = torch.randn(d_sae, generator=random)
    if kind in ("small", "huge"):
        x *= 1e-12 if kind == "small" else 1e12
    elif kind == "mixed":  # latents and inputs of very different length
        x *= 10 ** torch.empty(batch, 1).uniform_(-6, 6, generator=random)
        W *= 10 ** torch.empty(d_sae, 1).uniform_(-3, 3, generator=random)
    elif kind == "close":  # latents that differ less than bfloat16 can tell
        W = W[:1] + 1e-3 * W
    elif kind == "sparse":
        x *= torch.rand(x.shape, generator=random) < 0.05
    with pytest.MonkeyPatch.context() as patch:
        acts, indices = encode(x, W, b, k, True, patch)
    exact(x, W, b, k, acts, indices)


@pytest.mark.parametrize("certain", [False, True])
def test_ties_take_the_lowest_indices(certain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small integers: every product and sum is exact in float32, so ties are true ties."""
    random = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (50, 64), generator=random).float()
    W = torch.randint(-1, 2, (700, 64), generator=random).float()
    W[200:400] = W[:200]
    b = torch.zeros(700)
    acts, indices = encode(x, W, b, 12, certain, monkeypatch)
    expected = topk_encode_reference(x, W, b, 12)
    assert torch.equal(indices, expected[1]) and torch.equal(acts, expected[0])


@pytest.mark.parametrize("certain", [False, True])
def test_rows_that_cannot_be_decided_are_done_in_float32(
    certain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(40, 64, generator=random)
    W, b = torch.randn(900, 64, generator=random), torch.randn(900, generator=random)
    x[3] = 0  # all that is left is the bias
    b[100:900] = 0.5  # and most of it ties
    x[7, 5], x[9] = torch.nan, torch.inf
    x[11] = 3e38
    acts, indices = encode(x, W, b, 8, certain, monkeypatch)
    plain = [i for i in range(40) if i not in (7, 9, 11)]
    exact(x[plain], W, b, 8, acts[plain], indices[plain])
    rows = [3, 7]
    expected = topk_encode_reference(x[rows], W, b, 8)
    assert torch.equal(indices[rows], expected[1])
    assert not acts[7].any(), "NaN counts as 0"
    assert (acts >= 0).all() and not acts.isnan().any()


def test_few_rows_are_left_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(200, 576, generator=random)
    W = torch.nn.functional.normalize(torch.randn(2048, 576, generator=random))
    acts, indices = torch.empty(200, 16), torch.empty(200, 16, dtype=torch.int64)
    undecided = topk_encode._encode_certain(x, W, torch.zeros(2048), 16, acts, indices)
    assert len(undecided) == 0


@pytest.mark.parametrize("k", [1, 5, 40, 333])
def test_float32_selection_equals_the_reference(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(k)
    x, W, b = (torch.randn(s, generator=random) for s in ((30, 20), (333, 20), (333,)))
    acts, indices = encode(x, W, b, k, False, monkeypatch)
    expected = topk_encode_reference(x, W, b, k)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(acts, expected[0], rtol=1e-6, atol=1e-6)


def test_threads_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(s, generator=random) for s in ((300, 64), (999, 64), (999,)))
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(encode(x, W, b, 9, True, monkeypatch))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
