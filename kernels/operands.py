"""What every public op asks of its operands; the errors name the operand and its axes."""

import torch
from torch import Tensor


def check(name: str, tensor: Tensor, shape: tuple[int, ...], axes: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be [{axes}] = {list(shape)}, got {list(tensor.shape)}")


def check_matrix(name: str, tensor: Tensor, axes: str) -> None:
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have two axes [{axes}], got {list(tensor.shape)}")


def check_slots(indices: Tensor, row_starts: Tensor | None) -> int:
    """Refuse what is neither a rectangle nor ragged entries; returns the number of examples."""
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"latent_indices must be int64 or int32, got {indices.dtype}")
    if row_starts is None:
        if indices.dim() == 1:
            raise ValueError("`latent_indices` with one axis [entries] need `row_starts`")
        check_matrix("latent_indices", indices, "batch, k")
        return indices.shape[0]
    if indices.dim() != 1:
        raise ValueError(
            "`latent_indices` must have one axis [entries] with `row_starts`, "
            f"got {list(indices.shape)}"
        )
    if row_starts.dtype != torch.int64:
        raise TypeError(f"`row_starts` must be int64, got {row_starts.dtype}")
    if row_starts.dim() != 1 or len(row_starts) == 0:
        raise ValueError(
            f"`row_starts` must have one axis [batch + 1], got {list(row_starts.shape)}"
        )
    return len(row_starts) - 1


def check_like_slots(name: str, values: Tensor, indices: Tensor) -> None:
    """One value for each index."""
    check(name, values, tuple(indices.shape), "batch, k" if indices.dim() == 2 else "entries")
