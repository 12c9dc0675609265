"""Files that are written whole or not at all, and one-line errors for when that fails.

Every writer writes a temporary file next to the target, makes it durable and renames it over the
target, so that a reader finds the old file or the new one, never half of one.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saesteer.checkpoints.durable import Draft, make_folder
from saesteer.checkpoints.durable import writing as writing
from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.locks import LOCK_NAME

if TYPE_CHECKING:
    from torch import Tensor
else:  # torch takes seconds to import, and most callers here write JSON only
    Tensor = Any

# Larger than any JSON file that we write, and small enough to be read by mistake.
_MOST_JSON_BYTES = 256 << 20

# `force` empties a folder only when one of these files shows that we wrote it. JSON files whose
# names other programs use too must also have these keys.
_MARKERS: dict[str, tuple[str, ...]] = {
    "run.json": (),
    "manifest.json": ("schema_version", "shards"),
    "cfg.json": ("d_sae",),
    "plan.yaml": (),
    "demo.json": (),
    "report.json": (),
    "ranking.json": (),
    "sweep.json": (),
}
# ... and never when one of these shows that the folder is a project of the user's.
_PROJECT_FILES = (".git", ".hg", ".svn", "pyproject.toml", "package.json", "setup.py", "Makefile")


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file as 64 hexadecimal digits. A missing file raises `UserError`."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    return digest.hexdigest()


def plain(value: Any) -> Any:
    """`value` in JSON types: dataclasses become dicts, paths text, NaN and infinity null."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset | range):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [plain(item) for item in items]
    if hasattr(value, "tolist"):  # numpy scalars and arrays, tensors
        return plain(value.tolist())
    return str(value)


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON, whole or not at all. Values go through `plain` first."""
    write_text(path, json_text(obj))


def json_text(obj: Any) -> str:
    """`obj` as indented JSON, as `write_json` writes it."""
    return json.dumps(plain(obj), indent=2, ensure_ascii=False) + "\n"


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all. A full disk raises a one-line `UserError`."""
    path = Path(path)
    with writing(path), Draft(path) as draft:
        draft.write(text.encode())


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor | Sequence[Tensor]],
    metadata: Mapping[str, str] | None = None,
    *,
    cancelled: Callable[[], bool] = lambda: False,
    cached: bool = True,
) -> str:
    """Write tensors of any shape as safetensors, whole or not at all; returns the file's SHA-256.

    Tensors may lie on any device and share memory: each is written as its own contiguous copy.
    A tensor may be given as a sequence of pieces, whose rows follow each other. `cancelled` is
    called every few megabytes; once it returns true, the write ends with `durable.Cancelled`.
    Without `cached` the file leaves the system's file cache when it is on the disk (see
    `durable.Draft`). A full disk raises a one-line `UserError`. No failure leaves a temporary file.
    """
    from saesteer.checkpoints.tensor_bytes import tensor_bytes

    path = Path(path)
    with writing(path), Draft(path, cancelled, cached=cached) as draft:
        for piece in tensor_bytes(tensors, metadata):
            draft.write(piece)
    return draft.sha256


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    A missing or broken file, one of more than 256 MiB, and one with the same key twice in an
    object raise a one-line `UserError`.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise UserError(f"{path} is too large for a JSON file of ours; check the path")
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=no_key_twice)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); restore it or make it again"
        ) from error


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    A missing, truncated or corrupt file raises a one-line `UserError` that names it.
    """
    from safetensors.torch import load_file

    with reading_tensors(path):
        return dict(load_file(str(path)))


def read_header(path: str | Path) -> dict[str, Any]:
    """Names, dtypes and shapes in a safetensors file, without loading a tensor.

    Returns `{"tensors": {name: {"dtype": "F32", "shape": [...]}}, "metadata": {...}}`. The file's
    length is checked against the header; a wrong one raises a one-line `UserError`.
    """
    from safetensors import safe_open

    with reading_tensors(path), safe_open(str(path), framework="np") as file:
        tensors = {}
        for name in file.keys():
            piece = file.get_slice(name)
            tensors[name] = {"dtype": piece.get_dtype(), "shape": list(piece.get_shape())}
        return {"tensors": tensors, "metadata": dict(file.metadata() or {})}


@contextmanager
def reading_tensors(path: str | Path) -> Iterator[None]:
    """Turn what safetensors raises inside the block into a one-line `UserError` naming `path`."""
    from safetensors import SafetensorError

    if not Path(path).is_file():
        raise UserError(f"no file {path}; check the path")
    try:
        yield
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} is damaged or cut short ({reason}); copy, download or make it again"
        ) from error


def claim_output(
    path: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    flag: str = "`out`",
    can_resume: bool = False,
) -> Path:
    """Make `path` an output folder that this run may write to, and return it.

    A missing or empty folder is taken. A folder with something in it is refused unless `resume`
    (kept as it is) or `force` (emptied, but only when a file in it shows that saesteer wrote it).
    `can_resume` says whether the caller has a `resume` that the refusal can advise.

    Raises:
        UsageError: the folder is in use; `resume` and `force` together; `force` on a folder that is
            not ours, or that holds the working directory.
    """
    folder = Path(path).expanduser()
    if resume and force:
        raise UsageError(
            "`resume` and `force` contradict each other: `resume` continues what is in the folder, "
            "`force` deletes it; give one of them"
        )
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{flag} {folder} is a file; a folder is needed: choose another name")
    if not resume and folder.is_dir() and any(_entries(folder)):
        if not force:
            to_continue = "`resume` to continue it, " if can_resume else ""
            raise UsageError(
                f"{flag} {folder} exists and is not empty: add {to_continue}`force` to replace it, "
                f"or choose another {flag}"
            )
        _empty(folder, flag)
    try:
        make_folder(folder)
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"cannot write in {folder}: change its permissions or choose another {flag}"
        )
    return folder


def append_jsonl(path: str | Path, obj: Any) -> None:
    """Add one line of JSON to a file, making it if needed.

    A last line that an earlier kill cut short is removed first.
    """
    path = Path(path)
    line = (json.dumps(plain(obj), ensure_ascii=False) + "\n").encode()
    # Unbuffered: a buffer would try again to write the rest of a failed line when it is closed.
    with writing(path), open(path, "a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        whole = _end_of_last_line(file, size)
        if whole != size:
            file.truncate(whole)
        try:
            while line:
                line = line[file.write(line) :]
        except OSError:
            with contextlib.suppress(OSError):  # the error above is the one to report
                file.truncate(whole)
            raise


def read_jsonl(path: str | Path) -> list[Any]:
    """The objects of a JSON-lines file; a last line without its end is left out."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise UserError(f"{path} is not UTF-8 ({error}); restore it or make it again") from error
    objects = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        if line.strip():
            try:
                objects.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} line {number} is not valid JSON ({error})") from error
    return objects


def remove_leftovers(folder: str | Path) -> None:
    """Delete the temporary files that a killed writer left in `folder` (sub-folders untouched)."""
    for leftover in Path(folder).glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object from its pairs. Raises ValueError for a key that comes twice."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key[:60]!r} comes twice")
    return mapping


def _entries(folder: Path) -> Iterator[Path]:
    """The entries of a folder, except for the lock file of a run that writes there."""
    return (entry for entry in folder.iterdir() if entry.name != LOCK_NAME)


def _end_of_last_line(file: Any, size: int) -> int:
    """How many of the file's first `size` bytes are whole lines."""
    end = size
    while end > 0:
        start = max(0, end - 4096)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            return int(start + newline + 1)
        end = start
    return 0


def _empty(folder: Path, flag: str) -> None:
    """Delete everything in a folder, provided that saesteer wrote it."""
    place = folder.resolve()
    here = Path.cwd().resolve()
    if here.is_relative_to(place) or Path.home().resolve().is_relative_to(place):
        raise UsageError(
            f"{flag} {folder} holds the working or home directory, which `force` will not empty: "
            f"choose another {flag}"
        )
    project = [name for name in _PROJECT_FILES if (place / name).exists()]
    if project or not _looks_ours(place):
        evidence = (
            f"it holds {project[0]}" if project else f"none of {', '.join(_MARKERS)} is in it"
        )
        raise UsageError(
            f"{flag} {folder} was not written by saesteer ({evidence}), so `force` will not empty "
            f"it: empty it yourself or choose another {flag}"
        )
    for entry in _entries(place):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _looks_ours(folder: Path) -> bool:
    """Whether a marker lies in `folder`, or in one of its `layer-...` folders."""
    places = [folder, *sorted(folder.glob("layer-*"))]
    for place in places:
        for name, keys in _MARKERS.items():
            marker = place / name
            if not marker.is_file():
                continue
            if not keys:
                return True
            with contextlib.suppress(UserError):
                content = read_json(marker)
                if isinstance(content, dict) and all(key in content for key in keys):
                    return True
    return False
