"""Files that appear whole or not at all, and the errors a person can mend when they do not.

Every writer puts a temporary file beside the target, makes it durable, and renames it over the
target, so that a reader (or a killed process) meets the old file or the new one, never half of one.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saesteer.checkpoints.errors import UsageError, UserError

if TYPE_CHECKING:
    from torch import Tensor
else:  # torch takes seconds to import, and most callers here write JSON only
    Tensor = Any

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OS_ERROR_NUMBER = re.compile(r"os error (\d+)")

# A folder may be emptied by --force only when one of these files shows that we wrote it. For JSON
# files that other programs also use, the keys that make it ours.
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
# ... and never when one of these shows that it is somebody's project.
_KEEP = (".git", ".hg", ".svn", "pyproject.toml", "package.json", "setup.py", "Makefile")


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
    """`value` as JSON knows it: dataclasses become dicts, paths text, NaN and infinity null."""
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
    write_text(path, json.dumps(plain(obj), indent=2, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all. A full disk raises a one-line `UserError`."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)

    _replace(Path(path), write)


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors of any shape as safetensors, whole or not at all.

    Tensors may lie on any device and share memory: each is written as its own contiguous copy.
    A full disk raises a one-line `UserError` and leaves no temporary file.
    """
    from safetensors.torch import save_file

    owned: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        if storage in storages:  # safetensors refuses tensors that share memory
            tensor = tensor.clone()
        storages.add(storage)
        owned[name] = tensor

    def write(temporary: Path) -> None:
        save_file(owned, str(temporary), metadata=dict(metadata) if metadata else None)
        temporary.chmod(0o666 & ~_umask())  # safetensors makes files that only the owner can read

    _replace(Path(path), write)


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. A missing or broken file raises a one-line `UserError`."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    except ValueError as error:
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
            f"{path} is damaged or cut short ({reason}); copy or download it again, or make it anew"
        ) from error


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write of `path` inside the block into a one-line `UserError`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        found = _OS_ERROR_NUMBER.search(str(error))
        if number is None and found:  # safetensors reports the number in its text only
            number = int(found.group(1))
        if number in _NO_SPACE:
            raise UserError(
                f"no space left while writing {path}: free some space, then run the same command "
                "again (with --resume to continue what was saved)"
            ) from error
        reason = os.strerror(number) if number else str(error).splitlines()[0]
        raise UserError(
            f"cannot write {path} ({reason}): check the folder and its permissions"
        ) from error


def claim_output(
    path: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    flag: str = "--out",
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
            "--resume and --force contradict each other: --resume continues what is in the folder, "
            "--force deletes it; give one of them"
        )
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{flag} {folder} is a file; a folder is needed: choose another name")
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        if not force:
            to_continue = "--resume to continue it, " if can_resume else ""
            raise UsageError(
                f"{flag} {folder} exists and is not empty: add {to_continue}--force to replace it, "
                f"or choose another {flag}"
            )
        _empty(folder, flag)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {folder} ({error.strerror}): choose another {flag}"
        ) from error
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
    objects = []
    for number, line in enumerate(text.split("\n")[:-1], 1):
        if line.strip():
            try:
                objects.append(json.loads(line))
            except ValueError as error:
                raise UserError(f"{path} line {number} is not valid JSON ({error})") from error
    return objects


def remove_leftovers(folder: str | Path) -> None:
    """Delete the temporary files that a killed writer left in `folder` (sub-folders untouched)."""
    for leftover in Path(folder).glob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, make it durable, and rename it to `path`."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with writing(path):
            write(temporary)
            _sync(temporary)
            os.replace(temporary, path)
        # So that the new name survives a power cut too. The file is there already, and some
        # network file systems cannot do this: a failure here is not a failure to write.
        with contextlib.suppress(OSError):
            _sync(path.parent)
    except BaseException:  # Ctrl-C too must leave nothing behind
        temporary.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


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
    """Delete everything in a folder that saesteer wrote; refuse any other."""
    place = folder.resolve()
    here = Path.cwd().resolve()
    if here.is_relative_to(place) or Path.home().resolve().is_relative_to(place):
        raise UsageError(
            f"{flag} {folder} holds the working or home directory, which --force will not empty: "
            f"choose another {flag}"
        )
    project = [name for name in _KEEP if (place / name).exists()]
    if project or not _looks_ours(place):
        found = f"it holds {project[0]}" if project else f"none of {', '.join(_MARKERS)} is in it"
        raise UsageError(
            f"{flag} {folder} was not written by saesteer ({found}), so --force will not empty it: "
            f"empty it yourself or choose another {flag}"
        )
    for entry in place.iterdir():
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
