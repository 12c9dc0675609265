"""The auxiliary loss and its gradients against dense, differentiable PyTorch."""

import pytest
import torch
from torch import Tensor

from saesteer.kernels import auxk as module
from saesteer.kernels.auxk import auxk_op, auxk_reference, keep_largest_
from saesteer.kernels.ops import auxk


def problem(
    batch: int, d_model: int, d_sae: int, dead: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    ids = torch.randperm(d_sae, generator=random)[:dead]
    return [
        normal(batch, d_model), normal(batch, d_model), normal(d_sae, d_model), normal(d_sae),
        normal(d_sae, d_model), ids,
    ]  # fmt: skip


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("batch", "d_model", "d_sae", "dead", "k_aux"),
    [(2, 1, 1, 1, 1), (9, 41, 60, 20, 5), (7, 5, 30, 30, 64), (6, 8, 40, 12, 12), (5, 6, 9, 0, 4)],
)
def test_loss_and_every_gradient(
    batch: int, d_model: int, d_sae: int, dead: int, k_aux: int, dtype: torch.dtype
) -> None:
    x, residual, W_enc, b_enc, W_dec, ids = problem(batch, d_model, d_sae, dead, dtype)
    wide = [t.double().requires_grad_() for t in (W_enc, b_enc, W_dec)]
    expected = auxk_reference(x.double(), residual.double(), *wide, ids, k_aux)
    loss, W_enc_grads, b_enc_grads, W_dec_grads = auxk(x, residual, W_enc, b_enc, W_dec, ids, k_aux)
    close = (
        {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    )
    torch.testing.assert_close(loss.double(), expected.detach(), **close)
    grads = torch.autograd.grad(expected, wide, allow_unused=True)
    for ours, dense, full in zip((W_enc_grads, b_enc_grads, W_dec_grads), grads, wide, strict=True):
        dense = torch.zeros_like(full) if dense is None else dense
        torch.testing.assert_close(ours.double(), dense[ids], **close)
        rest = dense.clone()
        rest[ids] = 0
        assert not rest.any(), "only the given latents have a gradient"


def compare_bfloat16(device: str) -> None:
    """Loss and gradients from bfloat16 operands beside the reference in float64."""
    problems = problem(64, 96, 200, 80, torch.bfloat16)
    *inputs, ids = (t.to(device) for t in problems)
    x, residual, *parameters = (t.double() for t in inputs)
    wide = [t.requires_grad_() for t in parameters]
    expected = auxk_reference(x, residual, *wide, ids, 16)
    found = auxk(*inputs, ids, 16)
    assert all(t.dtype == torch.float32 for t in found)
    grads = [g[ids] for g in torch.autograd.grad(expected, wide)]
    for ours, dense in zip(found, (expected.detach(), *grads), strict=True):
        # Activations and errors are rounded to bfloat16, each by 2**-9 at most: a sum of them is
        # off by as much of its largest terms.
        assert (ours - dense).abs().max() <= 2**-7 * dense.abs().max()


def test_bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU does with bfloat16 operands, in a product that a CPU has."""

    def product(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        return a.to(out_dtype) @ b.to(out_dtype)

    monkeypatch.setattr(module, "_product_dtype", lambda dtype, *operands: torch.bfloat16)
    monkeypatch.setattr(torch, "mm", product)
    compare_bfloat16("cpu")


@pytest.mark.gpu
def test_bfloat16_products_on_the_gpu() -> None:
    compare_bfloat16("cuda")


def test_fillers_take_no_part() -> None:
    x, residual, *parameters, ids = problem(9, 5, 30, 12)
    few = auxk(x, residual, *parameters, ids[:7], 4)
    filled = auxk(x, residual, *parameters, ids, 4, torch.arange(12) >= 7)
    torch.testing.assert_close(filled[0], few[0])
    for with_fillers, without in zip(filled[1:], few[1:], strict=True):
        torch.testing.assert_close(with_fillers[:7], without)
        assert not with_fillers[7:].any()


def test_gradcheck() -> None:
    x, residual, *parameters, ids = problem(5, 4, 12, 6)
    inputs = [t.requires_grad_() for t in parameters]
    assert torch.autograd.gradcheck(lambda *p: auxk(x, residual, *p, ids, 3)[0], inputs)


def test_opcheck() -> None:
    inputs = problem(5, 4, 12, 6, torch.float32)
    inputs[2].requires_grad_()
    torch.library.opcheck(auxk_op, (*inputs, None, 3))


@pytest.mark.parametrize("choice", ["auto", "torch"])
def test_the_largest_are_kept(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAESTEER_KERNELS", choice)
    nan, inf = torch.nan, torch.inf
    rows = torch.tensor([
        [1.0, 3.0, 2.0, 3.0, 3.0], [-1.0, -2.0, 0.0, -0.0, 1e-30],
        [nan, 1.0, inf, -inf, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0],
    ])  # fmt: skip
    kept = keep_largest_(rows.clone(), 2)
    assert kept.tolist() == [
        [0, 3, 0, 3, 0], [0, 0, 0, 0, 1e-30 if kept.dtype == torch.float64 else float(rows[1, 4])],
        [0, 0, inf, 0, 2], [0, 0, 0, 0, 0], [5, 4, 0, 0, 0],
    ]  # fmt: skip
    assert keep_largest_(rows.clone(), 9)[2].tolist() == [0, 1, inf, 0, 2]
