"""What every public op asks of its operands; the errors name the operand and its axes."""

import torch
from torch import Tensor


def check(name: str, tensor: Tensor, shape: tuple[int, ...], axes: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be [{axes}] = {list(shape)}, got {list(tensor.shape)}")


def check_matrix(name: str, tensor: Tensor, axes: str) -> None:
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have two axes [{axes}], got {list(tensor.shape)}")


def check_slots(indices: Tensor) -> None:
    check_matrix("latent_indices", indices, "batch, k")
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"latent_indices must be int64 or int32, got {indices.dtype}")
