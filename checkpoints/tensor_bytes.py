"""Turns tensors into the bytes of a safetensors file, piece by piece.

The writer of safetensors itself builds or copies the whole file in one call, during which other
threads wait. Here the bytes come one tensor at a time, so that a background save does not stop the
run, and a checksum needs no second reading. The bytes are the same as those of safetensors.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

# safetensors writes dtypes in the reverse of this order, so that all data is aligned.
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
_RANK = {dtype: rank for rank, dtype in enumerate(_NAMES)}


def tensor_bytes(
    tensors: Mapping[str, Tensor | Sequence[Tensor]], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The header, then the data of each tensor; nothing of the next is copied before its turn.

    Tensors may have any shapes and strides, lie on any device and share memory; one may be given as
    pieces of equal dtype and width, whose rows follow each other in the file. Raises TypeError for
    a dtype that safetensors does not know.
    """
    pieces = {name: _pieces(given) for name, given in tensors.items()}
    kinds = {name: parts[0].dtype for name, parts in pieces.items()}
    for name, kind in kinds.items():
        if kind not in _NAMES:
            raise TypeError(f"{name} has dtype {kind}, which safetensors cannot hold")
    order = sorted(pieces, key=lambda name: (-_RANK[kinds[name]], name))
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    end = 0
    for name in order:
        parts = pieces[name]
        shape = list(parts[0].shape)
        if len(parts) > 1:
            shape[0] = sum(len(part) for part in parts)
        start, end = end, end + math.prod(shape) * kinds[name].itemsize
        header[name] = {"dtype": _NAMES[kinds[name]], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        for part in pieces[name]:
            if part.numel():
                flat = part.detach().cpu().contiguous().reshape(-1)
                yield flat.view(torch.uint8).numpy().data


def _pieces(given: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """A tensor as its pieces. Raises ValueError for none, or for some that do not fit together."""
    parts = [given] if isinstance(given, Tensor) else given
    if not parts or len({(part.dtype, part.shape[1:]) for part in parts}) > 1:
        raise ValueError("a tensor needs pieces of one dtype and width, at least one")
    return parts
