"""Checks of operands that the public ops share; their errors name the operand and its axes."""

import torch
from torch import Tensor


def check(name: str, tensor: Tensor, shape: tuple[int, ...], axes: str) -> None:
    """Raise ValueError unless a tensor has this shape; ``axes`` names them in the error."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be [{axes}] = {list(shape)}, got {list(tensor.shape)}")


def check_matrix(name: str, tensor: Tensor, axes: str) -> None:
    """Raise ValueError unless a tensor has two axes."""
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have two axes [{axes}], got {list(tensor.shape)}")


def check_slots(indices: Tensor, row_starts: Tensor | None) -> int:
    """Check that indices are a rectangle or ragged entries; returns the number of examples.

    Raises:
        TypeError: indices or row_starts have a wrong dtype.
        ValueError: they have a wrong number of axes.
    """
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
    """Raise ValueError unless there is one value for each index."""
    check(name, values, tuple(indices.shape), "batch, k" if indices.dim() == 2 else "entries")


def check_rows(name: str, rows: Tensor, batch: int, width: int | None = None) -> int:
    """Raise ValueError unless there is a row for each example, or for so many in a row.

    Returns how many examples share a row: those that are pieces of one.
    """
    check_matrix(name, rows, "batch, d_model")
    pieces = max(1, batch // max(1, len(rows)))
    if len(rows) * pieces != batch or width not in (None, rows.shape[1]):
        wanted = [batch, rows.shape[1] if width is None else width]
        raise ValueError(
            f"{name} must be [batch, d_model] = {wanted}, or have one row for several examples in "
            f"a row, got {list(rows.shape)}"
        )
    return pieces
