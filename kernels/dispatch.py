"""Which implementation an op runs on: the Triton kernel, a compiled CPU loop, or the PyTorch twin.

The choice is made at every call, from the tensors it gets, so a CPU tensor works on a GPU machine.
``SAESTEER_KERNELS`` overrides it:

``auto`` (default)
    Triton for CUDA tensors in float32, bfloat16 or float16 where Triton is installed; compiled
    loops for float32 on the CPU where numba is installed (`saesteer.kernels.native`); else PyTorch.
    Where k is so large a share of d_sae that a dense product is cheaper, the dense product.
``torch``
    always the PyTorch twin.
``triton``
    always the Triton kernel; an error where it cannot run. CPU tensors need ``TRITON_INTERPRET=1``,
    which Triton reads once, when a kernel is defined: set it before Python starts.
"""

import logging
import os
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton  # noqa: F401
except ImportError:
    TRITON_INSTALLED = False
else:
    TRITON_INSTALLED = True

_log = logging.getLogger(__name__)

CHOICES = ("auto", "triton", "torch")

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether Triton kernels run in its interpreter, on the CPU. Fixed when the package is imported."""


def kernel_choice() -> str:
    """Value of ``SAESTEER_KERNELS``.

    Raises:
        ValueError: the value is none of auto, triton, torch.
    """
    choice = os.environ.get("SAESTEER_KERNELS", "").strip().lower() or "auto"
    if choice not in CHOICES:
        raise ValueError(
            f"SAESTEER_KERNELS={choice!r} is not known: set it to one of {', '.join(CHOICES)}"
        )
    return choice


@cache
def _log_missing_triton() -> None:
    _log.warning("Triton is not installed: CUDA tensors use the slower PyTorch kernels")


def use_triton(tensor: Tensor) -> bool:
    """Whether an op whose main operand is ``tensor`` runs its Triton kernel.

    Raises:
        ValueError: ``SAESTEER_KERNELS`` holds an unknown value.
        RuntimeError: ``SAESTEER_KERNELS=triton`` and Triton cannot run on this tensor.
    """
    choice = kernel_choice()
    if choice == "torch":
        return False
    if choice == "triton":
        if not TRITON_INSTALLED:
            raise RuntimeError(
                "SAESTEER_KERNELS=triton but Triton is not installed: "
                "install triton, or set SAESTEER_KERNELS to auto or torch"
            )
        if not tensor.is_cuda and not INTERPRETED:
            raise RuntimeError(
                f"SAESTEER_KERNELS=triton but the tensors are on {tensor.device.type}: move them "
                "to a CUDA device, set TRITON_INTERPRET=1, or set SAESTEER_KERNELS to auto or torch"
            )
        return True
    if not tensor.is_cuda or tensor.dtype == torch.float64:
        return False
    if not TRITON_INSTALLED:
        _log_missing_triton()
        return False
    return True


DENSE_BELOW = {"cpu": 16, "cuda": 113}
"""d_sae / k below which a dense product over all latents beats gathering k rows an example.

For the CPU this was measured: a float32 product and the gathered pass take equally long there. For
CUDA it is an estimate, the ratio of arithmetic to cache bandwidth of an H200.
"""


def prefers_dense(W: Tensor, k: float) -> bool:
    """Whether a dense product with ``W`` [d_sae, d_model] is cheaper than gathering k rows."""
    if kernel_choice() == "triton":
        return False
    return W.shape[0] < k * DENSE_BELOW.get(W.device.type, 0)


def accumulator_dtype(*tensors: Tensor) -> torch.dtype:
    """Dtype that sums are held in: float64 if any operand is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def unit_stride(tensor: Tensor) -> Tensor:
    """``tensor`` itself where its last axis has stride 1, else a contiguous copy.

    The kernels take a row stride and walk the last axis one element at a time. Expanded tensors
    (stride 0, such as the gradient of ``.sum()``) and transposed views are copied.
    """
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def column_block(d_model: int, widest: int) -> int:
    """Columns per Triton tile: the power of two up to ``widest`` that pads ``d_model`` least.

    At least 128 where ``d_model`` is that wide; of equally good widths the widest. 576 takes 5
    tiles of 128, 1024 takes 2 of 512.
    """
    block = 16
    while block < min(d_model, widest):
        block *= 2
    if block <= 128:
        return block
    sizes = [size for size in (128, 256, 512) if size <= widest]
    return min(sizes, key=lambda size: (-(-d_model // size) * size, -size))


class Tile(NamedTuple):
    """How a Triton kernel that adds up gathered rows cuts its work.

    With 16 bytes per lane, 512 bytes of a row to a warp, each lane holds its columns of all rows of
    the tile: their loads do not wait for one another, and adding them up needs no other lane.
    Programs go through the batch before they go on to the next columns, so the columns in use, far
    fewer bytes than whole rows, stay in the L2 cache.
    """

    rows: int
    """Rows loaded at a time."""
    row_bytes: int
    """Largest number of bytes of each row that one program works on; a power of two."""
    warps: int
    """Warps per program at ``row_bytes``."""
    stages: int = 1
    """Tiles loaded ahead of the sum; more than one are buffered in shared memory."""

    def fit(self, d_model: int, element_bytes: int) -> tuple[int, int]:
        """Columns and warps of a program: the widest of which at most a quarter is padding."""
        columns, warps = max(16, self.row_bytes // element_bytes), self.warps
        while columns > 16 and (
            columns >= 2 * d_model
            or (columns > 128 and 3 * columns * -(-d_model // columns) > 4 * d_model)
        ):
            columns, warps = columns // 2, max(1, warps // 2)
        return columns, warps
