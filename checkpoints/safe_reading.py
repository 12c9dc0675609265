"""Reads files from untrusted sources: no code is run, and nothing is used before it is checked.

Each reader looks at the header first: names, dtypes, shapes and sizes must fit the file on disk
before memory is allocated for a tensor. A refusal is a one-line `UserError` that names the file.
"""

import json
import math
import os
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.files import no_key_twice

MAX_CONFIG_BYTES = 4 << 20
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 4096
MAX_AXES = 4

# Float weights hardly compress; a file that unpacks to more than this many times is not weights.
_MAX_EXPANSION = 16
_AGAIN = "download or make it again"

_SAFETENSORS_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_NUMPY_DTYPES = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a header describes it."""

    dtype: str
    shape: tuple[int, ...]


def inner_file(folder: Path, name: str) -> Path:
    """The path of a regular file in a folder.

    Raises UserError for a name or a link that leads out of the folder, and for devices and pipes.
    Links into the blobs of a Hub cache are allowed: the Hub stores files that way.
    """
    parts = name.replace("\\", "/").split("/")
    if name.startswith("/") or ".." in parts or "\0" in name or ":" in parts[0]:
        raise UserError(f"{folder}: the file name {name!r} leaves the folder; refused")
    path = folder / name
    try:
        home, target = folder.resolve(), path.resolve(strict=True)
        blobs = _hub_blobs(home)
        inside = target.is_relative_to(home) or (blobs is not None and target.is_relative_to(blobs))
        if not inside:
            raise UserError(
                f"{path} is a link out of its folder, to {target}: refused; copy the file here"
            )
        if not stat.S_ISREG(target.stat().st_mode):
            raise UserError(f"{path} is not a regular file; {_AGAIN}")
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "a link that leads nowhere"
        raise UserError(f"cannot read {path}: {reason}; check the path") from error
    return path


def _hub_blobs(folder: Path) -> Path | None:
    """Where the Hub cache keeps the content of `.../models--x/snapshots/REVISION/...`."""
    for parent in (folder, *folder.parents):
        if parent.parent.name == "snapshots" and parent.parent.parent.name.startswith("models--"):
            return parent.parent.parent / "blobs"
    return None


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object of at most 4 MiB in which no key comes twice."""
    with _reading(path):
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError(
                f"{path} is larger than {MAX_CONFIG_BYTES >> 20} MiB, too large for a config"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_key_twice)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not valid JSON ({_short(error)}); {_AGAIN}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; restore the file")
    return content


def safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of a safetensors file, its sizes checked against the file's."""
    with _reading(path):
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise UserError(
                    f"{path} is damaged or cut short: its header is not whole; {_AGAIN}"
                )
            if length > MAX_HEADER_BYTES:
                raise UserError(
                    f"{path} has a header of {length} bytes, more than {MAX_HEADER_BYTES}; {_AGAIN}"
                )
            try:
                header = json.loads(file.read(length), object_pairs_hook=no_key_twice)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path} has a broken header ({_short(error)}); {_AGAIN}"
                ) from error
        if not isinstance(header, dict):
            raise UserError(f"{path} has a header that is no JSON object; {_AGAIN}")
        header.pop("__metadata__", None)
        return _checked_header(path, header, size - 8 - length)


def read_safetensors(path: Path, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or those of `names` that it has, after the checks of
    `safetensors_header`. They do not share memory with the file."""
    from safetensors import SafetensorError, safe_open

    header = safetensors_header(path)
    if names is not None:
        wanted = set(names)
        header = {name: info for name, info in header.items() if name in wanted}
    try:
        with safe_open(str(path), framework="pt") as file:
            # The reader maps the file: copy, so that the file may be replaced later.
            present = file.keys() if names is None else header
            loaded = {name: file.get_tensor(name).clone() for name in present}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut short ({_short(error)}); {_AGAIN}") from error
    _same_as_header(path, loaded, header)
    return loaded


def npz_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of an npz file, without the arrays. Object arrays are refused."""
    with _reading(path), _archive(path) as archive:
        header = {}
        for info in _members(path, archive, compressed=True):
            name = info.filename.removesuffix(".npy")
            with archive.open(info) as member:
                shape, dtype, start = _npy_header(path, name, member)
            if start + math.prod(shape) * dtype.itemsize != info.file_size:
                raise UserError(f"{path}: {name} is not as long as its shape says; {_AGAIN}")
            header[name] = TensorInfo(str(dtype), shape)
        return header


def read_npz(path: Path) -> dict[str, Tensor]:
    """All arrays of an npz file as tensors, after the checks of `npz_header`. No pickle is read."""
    header = npz_header(path)
    tensors = {}
    with _reading(path), np.load(path, allow_pickle=False) as arrays:
        for name, info in header.items():
            try:
                array = arrays[name]
            except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise UserError(f"{path}: {name} is damaged ({_short(error)}); {_AGAIN}") from error
            if array.shape != info.shape:
                raise UserError(f"{path}: {name} has two shapes; {_AGAIN}")
            # A file may be in the other byte order, which torch does not take.
            native = array.astype(array.dtype.newbyteorder("="), order="C")
            tensors[name] = torch.from_numpy(native)
    return tensors


def check_sizes(path: Path, header: Mapping[str, TensorInfo], item_bytes: Mapping[str, int]) -> int:
    """The bytes of all tensors; raises UserError when this machine has less memory than that."""
    total = sum(math.prod(info.shape) * item_bytes[info.dtype] for info in header.values())
    memory = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    )
    if memory and total > memory:
        raise UserError(
            f"{path} holds {total / 1e9:.0f} GB of tensors, more than this machine's memory of "
            f"{memory / 1e9:.0f} GB: use a larger machine"
        )
    return total


def check_shape(path: Path, name: str, shape: Any) -> tuple[int, ...]:
    """`shape` as a tuple of whole numbers >= 0, few enough to be an SAE's."""
    if not isinstance(shape, list | tuple) or len(shape) > MAX_AXES:
        raise UserError(f"{path}: {name} has the shape {shape!r}; {_AGAIN}")
    for size in shape:
        if type(size) is not int or not 0 <= size < 1 << 48:
            raise UserError(f"{path}: {name} has the shape {list(shape)!r}; {_AGAIN}")
    return tuple(shape)


def _checked_header(path: Path, header: Mapping[str, Any], room: int) -> dict[str, TensorInfo]:
    if len(header) > MAX_TENSORS:
        raise UserError(f"{path} names {len(header)} tensors, more than {MAX_TENSORS}; {_AGAIN}")
    infos, spans = {}, []
    for name, row in header.items():
        dtype = row.get("dtype") if isinstance(row, dict) else None
        if not isinstance(dtype, str) or dtype not in _SAFETENSORS_BYTES:
            raise UserError(
                f"{path}: {name} has dtype {dtype!r}; an SAE's is one of "
                f"{', '.join(_SAFETENSORS_BYTES)}"
            )
        info = TensorInfo(dtype, check_shape(path, name, row.get("shape")))
        span = row.get("data_offsets")
        if not isinstance(span, list) or [type(place) for place in span] != [int, int]:
            raise UserError(f"{path}: {name} has wrong data_offsets; {_AGAIN}")
        size = math.prod(info.shape) * _SAFETENSORS_BYTES[info.dtype]
        if not 0 <= span[0] <= span[1] <= room or span[1] - span[0] != size:
            raise UserError(
                f"{path} is damaged or cut short: {name} asks for {size} bytes of {room}; {_AGAIN}"
            )
        infos[name] = info
        spans.append(span)
    check_sizes(path, infos, _SAFETENSORS_BYTES)
    return infos


def _npy_header(path: Path, name: str, member: Any) -> tuple[tuple[int, ...], Any, int]:
    """Shape, dtype and length of the header of one array in an npz file."""
    from numpy.lib import format as npy

    try:
        version = npy.read_magic(member)
        if version == (1, 0):
            shape, _, dtype = npy.read_array_header_1_0(member)
        elif version == (2, 0):
            shape, _, dtype = npy.read_array_header_2_0(member)
        else:
            raise ValueError(f"unknown version {version}")
    except (ValueError, TypeError, EOFError, MemoryError, RecursionError, SyntaxError) as error:
        raise UserError(f"{path}: {name} is damaged ({_short(error)}); {_AGAIN}") from error
    if dtype.hasobject or dtype.newbyteorder("=").name not in _NUMPY_DTYPES:
        raise UserError(
            f"{path}: {name} holds {dtype}, which may carry code or is no number: refused"
        )
    return check_shape(path, name, tuple(shape)), dtype, int(member.tell())


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        EOFError,
        RuntimeError,
        ValueError,
        OverflowError,
    ) as error:
        raise UserError(f"{path} is not a whole zip archive ({_short(error)}); {_AGAIN}") from error
    except zlib.error as error:
        raise UserError(f"{path} is damaged ({_short(error)}); {_AGAIN}") from error


def _members(path: Path, archive: zipfile.ZipFile, compressed: bool) -> list[zipfile.ZipInfo]:
    """The members of an archive whose names and sizes can be trusted."""
    members, size = archive.infolist(), path.stat().st_size
    names = [info.filename for info in members]
    if len(names) > MAX_TENSORS or len(set(names)) != len(names):
        raise UserError(f"{path} holds a name twice, or too many; {_AGAIN}")
    for info in members:
        parts = info.filename.replace("\\", "/").split("/")
        if ".." in parts or info.filename.startswith(("/", "\\")):
            raise UserError(f"{path} holds the name {info.filename!r}, which leaves it; refused")
        if info.flag_bits & 1 or (not compressed and info.compress_type != zipfile.ZIP_STORED):
            raise UserError(f"{path} is packed in a way that torch.save never does; refused")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{path} is packed in a way that numpy never does; refused")
    total, packed = sum(i.file_size for i in members), sum(i.compress_size for i in members)
    # Members that share bytes of the file, or that unpack to far more: a zip bomb.
    if packed > size or total > _MAX_EXPANSION * size + (1 << 20):
        raise UserError(f"{path} unpacks from {size} to {total} bytes; refused as a zip bomb")
    return members


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or _short(error)
        raise UserError(f"cannot read {path}: {reason}; check the path") from error


def _same_as_header(
    path: Path, loaded: Mapping[str, Tensor], header: Mapping[str, TensorInfo]
) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in loaded.items()}
    if shapes != {name: info.shape for name, info in header.items()}:
        raise UserError(f"{path} holds other tensors than its header says: refused")


def _short(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    text = lines[0] or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
