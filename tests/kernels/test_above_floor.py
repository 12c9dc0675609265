"""Pre-activations that rounded products ruled out are never above the floor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("numba", reason="numba is not installed")

import numpy as np

from saesteer.kernels import above_floor, above_floor_cpu, near_products, topk_encode
from saesteer.kernels.above_floor import chunks
from saesteer.kernels.batchtopk_encode import batchtopk_encode_native, batchtopk_encode_reference
from saesteer.kernels.threshold_encode import threshold_encode_native, threshold_encode_reference

Found = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded products on any CPU and for any batch."""
    use_rounded(monkeypatch)


def use_rounded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(near_products, "fast_bfloat16", lambda: True)
    patch.setattr(near_products, "LEAST_ROWS", 1)


def found_above(x: Tensor, W: Tensor, b: Tensor, floor: float) -> Found:
    """Values, places and row starts of a whole batch."""
    values, places, starts = [], [], [0]
    for chunk in chunks(x, W, b, 1):
        assert chunk.near is not None
        above, where, own = chunk.above(np.float32(floor))
        values.append(torch.from_numpy(above))
        places.append(torch.from_numpy(where))
        starts += [starts[-1] + int(at) for at in own[1:]]
    return torch.cat(values), torch.cat(places), torch.tensor(starts)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 20),
    d_model=st.sampled_from([64, 65, 100, 576]),
    d_sae=st.integers(40, 400),
    share=st.floats(0.0, 0.2),
    chunk=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["normal", "small", "huge", "mixed", "close", "sparse"]),
)
def test_nothing_above_is_ruled_out(
    batch: int, d_model: int, d_sae: int, share: float, chunk: int, seed: int, kind: str
) -> None:
    random = torch.Generator().manual_seed(seed)
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
    true = x.double() @ W.double().t() + b.double()
    floor = float(true.flatten().quantile(1 - share).float())
    with pytest.MonkeyPatch.context() as patch:
        use_rounded(patch)
        patch.setattr(topk_encode, "CPU_CHUNK_BYTES", 0)
        patch.setattr(topk_encode, "CPU_CHUNK_ROWS", chunk)
        values, places, starts = found_above(x, W, b, floor)
    sizes = x.double().abs() @ W.double().abs().t() + b.double().abs() + 1e-30
    # Each of d_model products and sums rounded at 6e-8, twice (here and for the floor).
    slack = 2 * (d_model + 8) * 6e-8 * sizes
    taken = torch.zeros(batch * d_sae, dtype=torch.bool)
    taken[places] = True
    assert (places.diff() > 0).all(), "ascending, so distinct"
    assert taken[(true - slack > floor).flatten()].all()
    assert not taken[(true + slack < floor).flatten()].any()
    assert ((values.double() - true.flatten()[places]).abs() <= slack.flatten()[places]).all()
    assert torch.equal(starts, torch.searchsorted(places, torch.arange(batch + 1) * d_sae))


@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize("most", [0.0, 1.0])
def test_whole_numbers_ties_nan_and_infinity(most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product and sum is exact: the two encoders find what the dense definition says."""
    monkeypatch.setattr(above_floor, "MOST_POSSIBLE", most)
    random = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (50, 64), generator=random).float()
    W = torch.randint(-1, 2, (700, 64), generator=random).float()
    W[200:400] = W[:200]
    b, floors = torch.zeros(700), torch.randint(5, 30, (700,), generator=random) + 0.5
    for odd in (False, True):
        if odd:
            x[7, 5], x[9], b[11] = torch.nan, 0, torch.inf
        wanted = batchtopk_encode_reference(x, W, b, 12)
        assert all(map(torch.equal, batchtopk_encode_native(x, W, b, 12), wanted))
        expected = threshold_encode_reference(x, W, b, floors)
        assert all(map(torch.equal, threshold_encode_native(x, W, b, floors), expected))


@pytest.mark.usefixtures("rounded")
def test_few_are_multiplied_again() -> None:
    """Of 2048 latents about 16 are wanted; the bounds leave less than twice as many."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(200, 576, generator=random)
    W = torch.nn.functional.normalize(torch.randn(2048, 576, generator=random))
    (chunk,) = chunks(x, W, torch.zeros(2048), 16)
    assert chunk.near is not None
    possible = torch.zeros(200, dtype=torch.int64)
    above_floor_cpu.count_possible(
        chunk.product.view(torch.uint16).numpy(),
        chunk.near.x_sizes, chunk.near.error_scales, np.zeros(2048, np.float32), np.float32(2.4),
        possible.numpy(), 0, 200,
    )  # fmt: skip
    above = len(chunk.above(np.float32(2.4))[0])
    assert above <= int(possible.sum()) < 2 * above


@pytest.mark.usefixtures("rounded")
def test_threads_do_not_change_the_result() -> None:
    random = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(s, generator=random) for s in ((300, 64), (999, 64), (999,)))
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(batchtopk_encode_native(x, W, b, 9))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
