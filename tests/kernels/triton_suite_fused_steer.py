"""The fused encoder's and the steering kernels, as triton_suite.py runs the others.

The smallest product tile takes the interpreter milliseconds: a handful of tiles per test.
"""

import math
import os

import pytest
import torch
from torch import Tensor

os.environ["SAESTEER_KERNELS"] = "triton"

from saesteer.kernels import ops, steer_add, steer_clamp, steering_ops, topk_encode_fused
from saesteer.kernels.dispatch import INTERPRETED
from saesteer.kernels.topk_certificate import kept_per_tile, select_certified
from saesteer.kernels.topk_encode import topk_encode_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cpu" if INTERPRETED else "cuda"

DTYPES = [torch.float32, torch.float64, torch.bfloat16]

# The interpreter cuts bfloat16 off instead of rounding it: 2**-7 of the value.
CLOSE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-4},
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-3},
}


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
    far = far.as_strided(values.shape, (2**31, 1))  # pages that nobody touches cost nothing
    return far.copy_(values)


def whole_numbers(batch: int, d_model: int, d_sae: int, dtype: torch.dtype) -> list[Tensor]:
    """Products and sums of small integers are exact: ties are real, every index has to agree."""
    x = (integers(9, batch, d_model) - 4).to(dtype)
    W = (integers(9, d_sae, d_model, seed=1) - 4).to(dtype)
    return [x, W, integers(5, d_sae, seed=2).to(dtype)]


ENCODERS = [(1, 1, 1, 1), (3, 41, 50, 5), (2, 70, 300, 6), (0, 8, 200, 4), (5, 8, 128, 3)]
WIDE = [] if INTERPRETED else [(300, 576, 4608, 32), (70, 1100, 40000, 64), (2000, 64, 512, 8)]


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "d_model", "d_sae", "k"), ENCODERS + WIDE)
def test_fused_encoding(
    batch: int, d_model: int, d_sae: int, k: int, dtype: torch.dtype, strided: bool
) -> None:
    inputs = whole_numbers(batch, d_model, d_sae, dtype)
    assert kept_per_tile(d_sae, k) is not None
    acts, indices = ops.encode_topk_fused(*inputs, k, strided=strided)
    expected, expected_indices = topk_encode_reference(*(t.double() for t in inputs), k)
    assert acts.dtype == torch.float32
    assert torch.equal(indices, expected_indices)
    assert torch.equal(acts.double(), expected)


@pytest.mark.parametrize(("kept", "strided"), [(1, True), (2, False)])
def test_flagged_rows_are_redone(kept: int, strided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two launches for the rows to redo; some tiles of rows lie beyond the end of the list.
    monkeypatch.setattr(topk_encode_fused, "REDO_BYTES", 16 * 300 * 4)
    monkeypatch.setattr(topk_encode_fused, "row_block", lambda batch: 16)
    x, W, b = whole_numbers(17, 6, 300, torch.float32)
    x[5:12] = 0  # the bias decides: its best latents lie in different tiles
    b[[7, 140, 291]] += 100
    pre_acts = x @ W.t() + b
    k = 3
    _, indices, flagged = select_certified(pre_acts, k, kept, strided)
    if kept == 1:
        assert flagged.all()
    else:
        assert not flagged[5:12].any()
    acts, indices = topk_encode_fused.encode_topk_fused_triton(x, W, b, k, kept, strided)
    expected, expected_indices = topk_encode_reference(x, W, b, k)
    assert torch.equal(indices, expected_indices)
    assert torch.equal(acts, expected)


@pytest.mark.parametrize("kept", [2])
def test_the_certificate_is_the_twins(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: list[Tensor] = []
    monkeypatch.setattr(
        topk_encode_fused, "_redo", lambda x, latents, bias, k, flag, *rest: flags.append(flag)
    )
    x, W, b = whole_numbers(8, 6, 260, torch.float32)
    acts, indices = topk_encode_fused.encode_topk_fused_triton(x, W, b, 5, kept, False)
    values, expected, flagged = select_certified(x @ W.t() + b, 5, kept, False)
    assert torch.equal(flags[0] > 0, flagged) and flagged.any()
    assert torch.equal(indices, expected)
    assert torch.equal(acts, values.clamp(min=0))


def test_fused_selection_of_odd_values() -> None:
    # The product is 0, so the bias is the pre-activation.
    d_sae, k = 300, 6
    for values in (
        [-1.0, -0.0, 0.0],
        [math.nan, -1.0, 2.0],
        [math.inf, -math.inf, 0.5, math.nan],
        [1.0, 1.0 + 2**-23],
        [-3.0, -3.0 - 2**-22],
        [-math.inf],
    ):
        bias = torch.tensor(values, device=DEVICE)[integers(len(values), d_sae)]
        x, W = torch.zeros(1, 8, device=DEVICE), torch.zeros(d_sae, 8, device=DEVICE)
        acts, indices = ops.encode_topk_fused(x, W, bias, k)
        expected, expected_indices = topk_encode_reference(x, W, bias, k)
        assert torch.equal(indices, expected_indices), values
        assert torch.equal(acts, expected), values


def test_fused_encoding_of_strided_and_unaligned_inputs() -> None:
    x, W, b = whole_numbers(3, 10, 140, torch.float32)
    views = [
        (x, W, b),
        (x.t().contiguous().t(), W.t().contiguous().t(), b),
        (x.repeat(1, 2)[:, :10], torch.cat([W[:, :1], W], 1)[:, 1:], b.repeat(2)[:140]),
    ]
    results = [ops.encode_topk_fused(*view, 4, strided=s) for view in views for s in (False, True)]
    for acts, indices in results[1:]:
        assert torch.equal(acts, results[0][0]) and torch.equal(indices, results[0][1])


def test_fused_weights_beyond_32_bits() -> None:
    x, W, b = whole_numbers(2, 20, 2, torch.bfloat16)
    for strided in (False, True):
        acts, indices = ops.encode_topk_fused(
            rows_far_apart(x), rows_far_apart(W), b, 1, strided=strided
        )
        expected, expected_indices = topk_encode_reference(x.float(), W.float(), b.float(), 1)
        assert torch.equal(acts, expected) and torch.equal(indices, expected_indices)


def test_fused_gradients() -> None:
    inputs = [t.requires_grad_() for t in whole_numbers(3, 8, 140, torch.float32)]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    ours = torch.autograd.grad(ops.encode_topk_fused(*inputs, 4)[0].sum(), inputs)
    dense = torch.autograd.grad(topk_encode_reference(*wide, 4)[0].sum(), wide)
    for mine, theirs in zip(ours, dense, strict=True):
        assert torch.equal(mine.double(), theirs)


# tokens, spots, sets, latents per set, d_model, d_sae.
ADDS = [(1, 1, 1, 1, 1, 1), (9, 4, 3, 11, 41, 20), (2, 2, 1, 3, 1000, 7), (4, 0, 2, 3, 8, 9)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ADDS)
def test_steer_add(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, spots, sets, m, d_model, d_sae = shape
    h, W_dec = normal(tokens, d_model, dtype=dtype), normal(d_sae, d_model, seed=1, dtype=dtype)
    alphas = normal(sets, m, seed=2, dtype=dtype)
    ids = integers(d_sae + 1, sets, m) - 1
    positions, set_ids = torch.randperm(tokens)[:spots].to(DEVICE), integers(sets, spots)
    expected = steer_add.steer_add_reference(
        h.double(), positions, set_ids, ids, alphas.double(), W_dec.double()
    )
    for indices in ((positions, set_ids, ids), (positions.int(), set_ids.int(), ids.int())):
        out = steering_ops.steer_add(h, *indices, alphas, W_dec)
        torch.testing.assert_close(out.double(), expected, **CLOSE[dtype])
    wide = h.repeat(1, 2)[:, :d_model]  # rows further apart than they are long
    steering_ops.steer_add_(wide, positions, set_ids, ids, alphas, W_dec)
    assert torch.equal(wide, out)


@pytest.mark.parametrize("mode", steer_clamp.MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 11, 41, 20), (2, 3, 600, 7), (0, 2, 8, 9)])
def test_steer_clamp(shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> None:
    tokens, m, d_model, d_sae = shape
    h, b = normal(tokens, d_model, dtype=dtype), normal(d_sae, seed=3, dtype=dtype)
    W_enc = normal(d_sae, d_model, seed=1, dtype=dtype)
    W_dec = normal(d_sae, d_model, seed=2, dtype=dtype)
    ids, values = torch.randperm(d_sae)[:m].to(DEVICE), normal(m, seed=4, dtype=dtype).abs()
    threshold = torch.linspace(-0.5, 1, d_sae).to(DEVICE, dtype)
    out = steering_ops.steer_clamp(
        h, W_enc, b, W_dec, ids, values, mode, activation="jumprelu", threshold=threshold
    )
    wide = (t.double() for t in (h, W_enc, b, W_dec))
    expected = steer_clamp.steer_clamp_reference(
        *wide, ids, values.double(), threshold.double()[ids], mode
    )
    close = dict(CLOSE[dtype])
    if dtype != torch.float64:  # activations are sums of up to 600 products of size 1
        close["atol"] = 2e-3 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.double(), expected, **close)
    if mode == "set":
        strided = [t.t().contiguous().t() for t in (h, W_enc, W_dec)]
        again = steering_ops.steer_clamp(
            strided[0],
            strided[1],
            b,
            strided[2],
            ids.int(),
            values,
            mode,
            activation="jumprelu",
            threshold=threshold,
        )
        assert torch.equal(again, out)


def test_steering_beyond_32_bits() -> None:
    values = normal(2, 20, dtype=torch.bfloat16)
    far = rows_far_apart(values)
    ids, ones = torch.tensor([[1], [0]], device=DEVICE), torch.ones(2, 1, device=DEVICE)
    spots = torch.arange(2, device=DEVICE)
    near = steering_ops.steer_add(values, spots, spots, ids, ones, values)
    assert torch.equal(steering_ops.steer_add(far, spots, spots, ids, ones, far), near)
    bias = torch.zeros(2, device=DEVICE)
    args = (bias, values, ids[:, 0], torch.ones(2, device=DEVICE))
    clamped = steering_ops.steer_clamp(values, values, *args)
    assert torch.equal(steering_ops.steer_clamp(far, far, bias, far, *args[2:]), clamped)
    steering_ops.steer_add_(far, spots, spots, ids, ones, values)
    assert torch.equal(far, near)
