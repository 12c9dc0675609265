"""One optimiser step of a TopK SAE in plain PyTorch, with dense activations."""

from collections.abc import Callable

import torch
from rivals import Job
from side_by_side import Contender
from torch import Tensor


def dense_loss(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, k: int
) -> Tensor:
    """Fraction of variance unexplained; matrices are `[d_model, d_sae]` and `[d_sae, d_model]`."""
    pre_acts = (x - b_dec) @ W_enc + b_enc
    best, chosen = pre_acts.topk(k, dim=1, sorted=False)
    acts = torch.zeros_like(pre_acts).scatter(1, chosen, best.relu())
    error = (acts @ W_dec + b_dec - x).float()
    return error.square().sum() / (x - x.mean(dim=0)).square().sum()


def dense_step(job: Job, *, compiled: bool = False, autocast: bool = False) -> Contender:
    """Loss, gradients without their part along the decoder rows, fused Adam, rows of length 1.

    On a CPU `compiled` traces the step but leaves its operations to PyTorch: the compiler for CPUs
    takes longer than all else that is measured there.
    """
    if job.dead:
        raise NotImplementedError("the dense step has no auxiliary loss")
    on_cuda = job.device.type == "cuda"
    W_dec = torch.nn.functional.normalize(
        torch.randn(job.d_sae, job.d_model, device=job.device), dim=1
    )
    parameters = [
        parameter.requires_grad_()
        for parameter in (
            W_dec.T.contiguous(),
            torch.zeros(job.d_sae, device=job.device),
            W_dec,
            torch.zeros(job.d_model, device=job.device),
        )
    ]
    adam = torch.optim.Adam(parameters, lr=1e-4, fused=True)

    def loss(x: Tensor) -> Tensor:
        with torch.autocast(job.device.type, torch.bfloat16, enabled=autocast):
            return dense_loss(x, *parameters, job.k)

    @torch.no_grad()
    def project() -> None:
        assert W_dec.grad is not None
        W_dec.grad -= (W_dec.grad * W_dec).sum(dim=1, keepdim=True) * W_dec

    @torch.no_grad()
    def normalise() -> None:
        W_dec.div_(W_dec.norm(dim=1, keepdim=True))

    parts: list[Callable[..., object]] = [loss, project, normalise]
    backend = "inductor" if on_cuda else "aot_eager"
    if compiled:
        parts = [torch.compile(part, backend=backend, dynamic=False) for part in parts]
    run_loss, run_project, run_normalise = parts

    def step(number: int) -> None:
        run_loss(job.at(number)).backward()  # type: ignore[attr-defined]
        run_project()
        adam.step()
        adam.zero_grad()
        run_normalise()

    how = f"torch.compile ({backend})" if compiled else "eager"
    dtype = "float32 under bfloat16 autocast" if autocast else "float32"
    return Contender(
        step,
        f"torch {torch.__version__}, {how}, {dtype}, dense, fused torch.optim.Adam, "
        "unit decoder rows, AuxK off",
    )
