"""The batch-wide selection is exact, whatever the guess, the chunks and the ties."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saesteer.kernels import batchtopk_encode, native, topk_encode
from saesteer.kernels.batchtopk_encode import (
    batchtopk_encode_native,
    batchtopk_encode_op,
    batchtopk_encode_reference,
    batchtopk_encode_torch,
)
from saesteer.kernels.ops import encode_batchtopk, sparse_decode

SHAPES = [(1, 1, 1, 1), (5, 41, 60, 7), (3, 1000, 17, 17), (0, 8, 20, 4), (33, 6, 451, 5)]
"""batch, d_model, d_sae, k."""
PATHS = [batchtopk_encode_torch] + [batchtopk_encode_native] * native.numba_installed()


def whole_numbers(batch: int, d_model: int, d_sae: int, *, shift: int = 0) -> list[Tensor]:
    """Small whole numbers: every sum is exact in float32, and ties are many."""
    rng = torch.Generator().manual_seed(batch + d_sae)

    def draw(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=rng).float()

    return [draw(batch, d_model), draw(d_sae, d_model), draw(d_sae) + shift]


def same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    return len(found) == 3 and all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("shift", [0, -300], ids=["many positive", "few positive"])
@pytest.mark.parametrize("run", PATHS)
@pytest.mark.parametrize(("batch", "d_model", "d_sae", "k"), SHAPES)
def test_ties_and_too_few_positive(
    batch: int, d_model: int, d_sae: int, k: int, run: object, shift: int
) -> None:
    if shift:
        shift = -2 * d_model if d_model > 6 else -5
    operands = whole_numbers(batch, d_model, d_sae, shift=shift)
    wanted = batchtopk_encode_reference(*operands, k)
    assert same(run(*operands, k), wanted)  # type: ignore[operator]
    assert len(wanted[0]) == batch * k and wanted[2].tolist()[-1] == batch * k


@pytest.mark.parametrize("run", PATHS)
def test_nothing_positive_nan_and_infinity(run: object) -> None:
    x, W, b = whole_numbers(9, 5, 40)
    empty = run(x, W, b - 1000, 3)  # type: ignore[operator]
    assert not empty[0].any() and same(empty, batchtopk_encode_reference(x, W, b - 1000, 3))
    x[4] = torch.nan
    b[[7, 11]] = torch.tensor([torch.inf, torch.nan])
    assert same(run(x, W, b, 3), batchtopk_encode_reference(x, W, b, 3))  # type: ignore[operator]


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 60),
    d_sae=st.integers(1, 300),
    share=st.floats(0, 1),
    chunk=st.integers(1, 70),
    order=st.sampled_from(["as drawn", "quiet rows first", "loud rows first"]),
    seed=st.integers(0, 10**6),
)
def test_neither_chunks_nor_a_wrong_guess_decide_anything(
    batch: int, d_sae: int, share: float, chunk: int, order: str, seed: int
) -> None:
    """Rows of very different size, so that the first chunk misleads the guess both ways."""
    pytest.importorskip("numba", reason="numba is not installed")
    k = 1 + round(share * (d_sae - 1) / 8)
    rng = torch.Generator().manual_seed(seed)
    x, W, b = whole_numbers(batch, 7, d_sae)
    size = torch.randint(1, 9, (batch,), generator=rng).float()
    if order != "as drawn":
        size = size.sort(descending=order == "loud rows first").values ** 3
    x = x * size[:, None]
    with pytest.MonkeyPatch.context() as patch:
        for module in (topk_encode,):
            patch.setattr(module, "CPU_CHUNK_BYTES", 0)
            patch.setattr(module, "CPU_CHUNK_ROWS", chunk)
        patch.setattr(batchtopk_encode, "GUESS_ROWS", 3)
        wanted = batchtopk_encode_reference(x, W, b, k)
        assert same(batchtopk_encode_native(x, W, b, k), wanted)
        assert same(batchtopk_encode_torch(x, W, b, k), wanted)


def test_no_more_than_a_chunk_and_the_candidates_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("numba", reason="numba is not installed")
    monkeypatch.setattr(topk_encode, "CPU_CHUNK_BYTES", 0)
    monkeypatch.setattr(topk_encode, "CPU_CHUNK_ROWS", 8)
    monkeypatch.setattr(native, "_kept", threading.local())
    rng = torch.Generator().manual_seed(0)
    x, W = torch.randn(256, 4, generator=rng), torch.randn(4096, 4, generator=rng)
    with torch.profiler.profile(profile_memory=True) as profile:
        encode_batchtopk(x, W, torch.zeros(4096), 4)
    events = profile.profiler.kineto_results.events()
    assert max(e.nbytes() for e in events if e.name() == "[memory]") == 8 * 4096 * 4


@pytest.mark.parametrize(("batch", "d_model", "d_sae", "k"), SHAPES)
def test_gradients_equal_the_dense_reference(batch: int, d_model: int, d_sae: int, k: int) -> None:
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64).requires_grad_()

    inputs = [draw(batch, d_model), draw(d_sae, d_model), draw(d_sae)]
    W_dec = draw(d_sae, d_model)
    results = []
    for run in (encode_batchtopk, batchtopk_encode_reference):
        acts, indices, starts = run(*inputs, k)
        decoded = sparse_decode(acts, indices, W_dec, None, starts)
        loss = (decoded - inputs[0].detach()).square().sum()
        results.append((loss, *torch.autograd.grad(loss, (*inputs, W_dec))))
    for ours, dense in zip(*results, strict=True):
        torch.testing.assert_close(ours, dense)


def test_opcheck() -> None:
    x, W, b = (t.double().requires_grad_() for t in whole_numbers(6, 5, 30))
    torch.library.opcheck(batchtopk_encode_op, (x, W, b, 4))


def test_wrong_operands_are_named() -> None:
    x, W, b = whole_numbers(6, 5, 30)
    with pytest.raises(ValueError, match=r"k must be in 1..30 \(d_sae\), got 31"):
        encode_batchtopk(x, W, b, 31)
