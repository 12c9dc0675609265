"""Reads `.pt` files without running them.

`torch.save` writes a zip archive: one pickle that describes the content, and one member of raw
numbers for each storage. A pickle is a program. Three steps keep it harmless, in this order:

1. its operations are listed without running them (`pickletools`), and only those that build plain
   containers and the few names that tensors need may occur;
2. an unpickler that knows those names alone builds a description: no tensor, no torch call. Shapes,
   strides and offsets are checked against the length of their member of the archive, because torch
   itself trusts them;
3. `torch.load(..., weights_only=True)` then reads the numbers.

No setting turns these checks off.
"""

import io
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saesteer.checkpoints import safe_reading
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.safe_reading import TensorInfo

MAX_PICKLE_BYTES = 1 << 20
MAX_DEPTH = 4
_MAX_VALUES = 100_000

_STORAGES = {
    "FloatStorage": ("float32", 4),
    "DoubleStorage": ("float64", 8),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}
_ITEM_BYTES = dict(_STORAGES.values())
_GLOBALS = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    *(("torch", name) for name in _STORAGES),
}
# Plain values, containers and the memo; calls only of the names above. INST and OBJ make instances,
# EXT* and STACK_GLOBAL find names by other ways, NEWOBJ calls __new__: torch.save needs none.
_OPERATIONS = {
    "PROTO", "STOP", "FRAME", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE",
    "INT", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "SHORT_BINUNICODE", "BINUNICODE", "BINBYTES", "SHORT_BINBYTES",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS",
    "EMPTY_DICT", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET",
    "LONG_BINGET", "GLOBAL", "REDUCE", "BUILD", "BINPERSID",
}  # fmt: skip


@dataclass(frozen=True)
class _Storage:
    """A member of raw numbers that the pickle points at."""

    dtype: str
    key: str
    count: int

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a storage takes no state")


class _Known:
    """One of the names in `_GLOBALS`; a fresh one each time, so that nothing can be altered."""

    def __init__(self, name: str, path: Path, sizes: Mapping[str, int]) -> None:
        self._name, self._path, self._sizes = name, path, sizes

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a name takes no state")

    def __call__(self, *args: Any) -> Any:
        if self._name == "_rebuild_parameter" and args and isinstance(args[0], TensorInfo):
            return args[0]
        if self._name == "_rebuild_tensor_v2" and len(args) >= 4:
            return _describe(self._path, self._sizes, *args[:4])
        raise pickle.UnpicklingError(f"{self._name} is called in a way that torch.save never does")


class _Describer(pickle.Unpickler):
    """Builds containers with a `TensorInfo` in the place of each tensor."""

    def __init__(self, path: Path, program: bytes, sizes: Mapping[str, int]) -> None:
        super().__init__(io.BytesIO(program))
        self._path, self._sizes = path, sizes

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _GLOBALS:
            raise pickle.UnpicklingError(f"names {module}.{name}")
        if name == "OrderedDict":
            return OrderedDict
        return _STORAGES[name] if name in _STORAGES else _Known(name, self._path, self._sizes)

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", (str(dtype), int()), str(key), _, int(count)):
                return _Storage(dtype, key, count)
        raise pickle.UnpicklingError("points at something that is no storage")


def describe_pt(path: Path) -> dict[Any, Any]:
    """What a `.pt` file holds: its (nested) dict with a `TensorInfo` for each tensor.

    Raises a one-line UserError for anything but a whole archive of plain data and tensors.
    """
    with safe_reading._reading(path):
        if not _is_zip(path):
            raise UserError(
                f"{path} is not a zip archive as torch.save writes it since 1.6: if you trust it, "
                "load it and save it again with torch.save"
            )
        with safe_reading._archive(path) as archive:
            program, sizes = _parts(path, archive)
    _check_operations(path, program)
    try:
        content = _Describer(path, program, sizes).load()
    except UserError:
        raise
    except Exception as error:  # a pickle is a program and may raise anything
        raise UserError(
            f"{path} does not hold plain tensors ({safe_reading._short(error)}): refused"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, and a dict of tensors is needed")
    infos: list[TensorInfo] = []
    plain = _plain(path, content, infos, [_MAX_VALUES], 0)
    named = {str(number): info for number, info in enumerate(infos)}
    safe_reading.check_sizes(path, named, _ITEM_BYTES)
    assert isinstance(plain, dict)
    return plain


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # raised for an archive split over several disks
        return False


def read_pt(path: Path) -> dict[Any, Any]:
    """The (nested) dict of a `.pt` file, after `describe_pt`, with `weights_only=True`."""
    described = describe_pt(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path} is refused by torch.load(weights_only=True) "
            f"({safe_reading._short(error)}); download or make it again"
        ) from error
    return {key: _owned(path, value, dict.get(loaded, key)) for key, value in described.items()}


def _parts(path: Path, archive: zipfile.ZipFile) -> tuple[bytes, dict[str, int]]:
    """The pickle, and the length of each member of numbers."""
    members = safe_reading._members(path, archive, compressed=False)
    programs = [info for info in members if info.filename.endswith("/data.pkl")]
    if len(programs) != 1:
        raise UserError(f"{path} is a zip archive, but not one that torch.save wrote")
    if programs[0].file_size > MAX_PICKLE_BYTES:
        raise UserError(
            f"{path} holds a pickle of {programs[0].file_size} bytes, too large for an SAE: refused"
        )
    top = programs[0].filename.removesuffix("data.pkl") + "data/"
    sizes = {
        info.filename.removeprefix(top): info.file_size
        for info in members
        if info.filename.startswith(top)
    }
    return archive.read(programs[0]), sizes


def _check_operations(path: Path, program: bytes) -> None:
    """Walk the pickle without running it."""
    try:
        for number, (operation, argument, _) in enumerate(pickletools.genops(program)):
            name = operation.name
            if name == "GLOBAL":
                where, _, what = str(argument).partition(" ")
                if (where, what) not in _GLOBALS:
                    raise UserError(
                        f"{path} is a pickle that names {where[:60]}.{what[:60]}, which could run "
                        "code: refused; save a plain dict of tensors instead"
                    )
            elif name not in _OPERATIONS:
                raise UserError(
                    f"{path} is a pickle with the operation {name}, which a dict of tensors does "
                    "not need: refused; save a plain dict of tensors instead"
                )
            # The memo is an array: one large index alone would take gigabytes.
            elif name in ("BINPUT", "LONG_BINPUT") and int(argument or 0) > number:
                raise UserError(f"{path} is a pickle whose memo has holes: refused")
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} holds a broken pickle ({safe_reading._short(error)}); download it again"
        ) from error


def _describe(
    path: Path, sizes: Mapping[str, int], storage: Any, offset: Any, shape: Any, stride: Any
) -> TensorInfo:
    """A tensor's description. Raises UserError unless all its elements are inside its storage."""
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    shape = safe_reading.check_shape(path, "a tensor", shape)
    stride = safe_reading.check_shape(path, "a stride", stride)
    if len(stride) != len(shape) or type(offset) is not int or offset < 0 or storage.count < 0:
        raise pickle.UnpicklingError("a tensor whose strides do not fit its shape")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    count = 1
    for size in shape:
        count *= size
    have = sizes.get(storage.key, -1)
    fits = storage.count * _ITEM_BYTES[storage.dtype] <= have and count <= storage.count
    if not fits or (count and last >= storage.count):
        raise UserError(
            f"{path} is damaged or cut short: a tensor of shape {list(shape)} needs more than the "
            f"{max(have, 0)} bytes that are there; download or make it again"
        )
    return TensorInfo(storage.dtype, shape)


def _plain(path: Path, value: Any, infos: list[TensorInfo], left: list[int], depth: int) -> Any:
    """The value if it is plain data, else UserError; adds the tensors in it to `infos`."""
    left[0] -= 1
    # A list may hold one other list a million times: count what is walked, not what is stored.
    if left[0] < 0 or depth > MAX_DEPTH:
        raise UserError(f"{path} nests more data than a dict of tensors needs: refused")
    if isinstance(value, TensorInfo):
        infos.append(value)
        return value
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {
            key: _plain(path, item, infos, left, depth + 1)
            for key, item in dict.items(value)
            if isinstance(key, str | int)
        }
    if isinstance(value, list | tuple):
        return [_plain(path, item, infos, left, depth + 1) for item in value]
    raise UserError(f"{path} holds a {type(value).__name__}, which is no plain data: refused")


def _owned(path: Path, described: Any, loaded: Any) -> Any:
    """The loaded value, after a check that it fits its description."""
    if isinstance(described, TensorInfo):
        if not isinstance(loaded, torch.Tensor) or tuple(loaded.shape) != described.shape:
            raise UserError(f"{path} holds other tensors than its pickle says: refused")
        return loaded.detach()
    if isinstance(described, dict) and isinstance(loaded, dict):
        return {key: _owned(path, item, dict.get(loaded, key)) for key, item in described.items()}
    return described
