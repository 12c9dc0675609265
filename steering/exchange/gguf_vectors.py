"""GGUF control vectors in the format of llama.cpp and repeng: tensors `direction.N`, float32.

A file may come from anyone, so every length is checked against the rest of the file before it is
used.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saesteer.checkpoints.durable import write_by
from saesteer.checkpoints.errors import UserError

MAX_BYTES = 1 << 30
_MAX_ENTRIES = 4096
_MAX_TEXT = 1 << 16
_F32 = 0

# GGUF's value types and how they are packed; 8 is a string, 9 an array.
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip


def write_control_vectors(path: Path, vectors: Mapping[int, Tensor], model_hint: str) -> None:
    """Write one direction for each 0-based block, to whose output it is added, as float32.

    Raises UserError for block 0, because llama.cpp refuses a whole file for it.
    """
    import gguf

    if 0 in vectors:
        raise UserError(
            "llama.cpp takes no control vector for the output of block 0: choose a plan of a later "
            "layer, or another `format`"
        )

    def write(temporary: Path) -> None:
        writer = gguf.GGUFWriter(str(temporary), "controlvector")
        writer.add_string("controlvector.model_hint", model_hint)
        writer.add_uint32("controlvector.layer_count", len(vectors))
        for layer, vector in sorted(vectors.items()):
            array = vector.detach().cpu().to(torch.float32).contiguous().numpy()
            writer.add_tensor(f"direction.{layer}", array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_by(path, write)


def read_control_vectors(path: Path) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """The directions by block, each `[d_model]`, and the metadata.

    Raises a one-line UserError for anything but a whole GGUF file of float32 directions.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise UserError(
                f"{path} is larger than {MAX_BYTES >> 20} MiB, too large for a control vector"
            )
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    try:
        return _parse(path, _Bytes(content))
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}); download it again") from error


class _Bytes:
    """The bytes of a file and a position in them."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.at = 0

    def take(self, pattern: str) -> Any:
        (value,) = struct.unpack_from(pattern, self.content, self.at)
        self.at += struct.calcsize(pattern)
        return value

    def text(self) -> str:
        length = self.take("<Q")
        if length > min(_MAX_TEXT, len(self.content) - self.at):
            raise ValueError(f"a text of {length} bytes")
        self.at += length
        return self.content[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])
        if kind == 8:
            return self.text()
        if kind == 9 and depth < 2:
            inner, count = self.take("<I"), self.take("<Q")
            if count > len(self.content) - self.at:
                raise ValueError(f"an array of {count} values")
            return [self.value(inner, depth + 1) for _ in range(count)]
        raise ValueError(f"an unknown kind of value, {kind}")


def _parse(path: Path, data: _Bytes) -> tuple[dict[int, Tensor], dict[str, Any]]:
    if data.content[:4] != b"GGUF":
        raise UserError(f"{path} is not a GGUF file; download it again")
    data.at = 4
    version, tensors, entries = data.take("<I"), data.take("<Q"), data.take("<Q")
    if version not in (2, 3):
        raise UserError(f"{path} is GGUF version {version}; 2 and 3 are read")
    if tensors > _MAX_ENTRIES or entries > _MAX_ENTRIES:
        raise UserError(
            f"{path} names {tensors} tensors and {entries} facts, too many for a control vector"
        )
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        key = data.text()
        if key in metadata:
            raise ValueError(f"the key {key[:60]!r} comes twice")
        metadata[key] = data.value(data.take("<I"))
    infos = []
    for _ in range(tensors):
        name = data.text()
        axes = data.take("<I")
        if axes > 4:
            raise ValueError(f"a tensor of {axes} axes")
        shape = [data.take("<Q") for _ in range(axes)]
        infos.append((name, shape, data.take("<I"), data.take("<Q")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 4096:
        raise ValueError(f"an alignment of {alignment}")
    start = -(-data.at // alignment) * alignment
    return _directions(path, data.content, infos, start), metadata


def _directions(
    path: Path, content: bytes, infos: list[tuple[str, list[int], int, int]], start: int
) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for name, shape, kind, offset in infos:
        prefix, _, number = name.partition(".")
        if prefix != "direction" or not number.isascii() or not number.isdigit() or len(number) > 6:
            raise UserError(
                f"{path} holds a tensor {name[:60]!r}; a control vector's are direction.N: give a "
                "control vector, not a model"
            )
        if kind != _F32 or len(shape) != 1 or not shape[0]:
            raise UserError(f"{path}: {name} must be one row of float32, as llama.cpp asks")
        end = start + offset + 4 * shape[0]
        if end > len(content):
            raise ValueError(f"{name} ends after the file")
        if int(number) in found:
            raise ValueError(f"{name} comes twice")
        values = np.frombuffer(content[start + offset : end], dtype="<f4").astype(np.float32)
        vector = torch.from_numpy(values.copy())
        if not bool(torch.isfinite(vector).all()):
            raise UserError(f"{path}: {name} holds NaN or infinity; make it again")
        found[int(number)] = vector
    if len({len(vector) for vector in found.values()}) > 1:
        raise UserError(f"{path} holds directions of different lengths; make it again")
    if not found:
        raise UserError(f"{path} holds no direction.N; give a control vector")
    return found
