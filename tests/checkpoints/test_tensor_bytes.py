"""The pieces are the file that the safetensors library writes."""

import pytest
import torch
from safetensors.torch import save

from saesteer.checkpoints.tensor_bytes import _NAMES, tensor_bytes


def joined(*arguments: object) -> bytes:
    return b"".join(bytes(piece) for piece in tensor_bytes(*arguments))  # type: ignore[arg-type]


def test_the_same_bytes_as_the_library() -> None:
    values = torch.arange(15).reshape(3, 5) % 2
    tensors = {f"{i}-{str(dtype)}": values.to(dtype) for i, dtype in enumerate(_NAMES)}
    tensors |= {
        "scalar": torch.tensor(2**40),
        "empty": torch.zeros(0, 4),
        "turned": torch.randn(3, 5).T.contiguous(),
        "ümlaut": torch.ones(1, dtype=torch.float16),
    }
    assert joined(tensors) == save(tensors)
    assert joined(tensors, {"a": "b\n"}) == save(tensors, {"a": "b\n"})


def test_strides_and_shared_memory_are_resolved() -> None:
    grid = torch.randn(4, 6)
    tensors = {"whole": grid, "turned": grid.T, "column": grid[:, 1], "again": grid}
    assert joined(tensors) == save({name: t.clone().contiguous() for name, t in tensors.items()})


def test_a_dtype_it_does_not_know() -> None:
    with pytest.raises(TypeError, match="a has dtype torch.complex128"):
        joined({"a": torch.zeros(1, dtype=torch.complex128)})


def test_a_tensor_in_pieces() -> None:
    grid, ids = torch.randn(6, 4, dtype=torch.bfloat16), torch.arange(6, dtype=torch.int32)
    pieces = {"grid": [grid[:1], grid[1:1], grid[1:].T.contiguous().T], "ids": [ids]}
    assert joined(pieces) == save({"grid": grid, "ids": ids})


@pytest.mark.parametrize(
    "pieces",
    [[], [torch.zeros(2, 3), torch.zeros(2, 4)], [torch.zeros(1), torch.zeros(1).double()]],
    ids=["none", "widths", "dtypes"],
)
def test_pieces_that_do_not_fit_together(pieces: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="pieces of one dtype and width"):
        joined({"a": pieces})
