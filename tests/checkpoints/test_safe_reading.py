"""Malformed, hostile files: a one-line UserError each, in bounded time and memory, no code run."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints import safe_reading
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import load_sae

from .bad_files import CORPUS, D_SAE, WEIGHTS, code_in_pt, npz, pt, refusal, saelens, with_header


@pytest.mark.parametrize("name", CORPUS)
def test_every_bad_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "sae"
    folder.mkdir()
    refusal(CORPUS[name](folder))
    assert not (folder / "ran").exists()


def test_the_good_files_of_the_corpus_load(tmp_path: Path) -> None:
    """So that the corpus is refused for what is wrong with it."""
    for number, build in enumerate((saelens, pt(), npz(), with_header(lambda h: None))):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert load_sae(build(folder)).spec.d_sae == D_SAE


def test_links_inside_a_hub_cache_pass(tmp_path: Path) -> None:
    repo = tmp_path / "models--a--b"
    snapshot = repo / "snapshots" / "0123"
    saelens(snapshot / "layer")
    (repo / "blobs").mkdir()
    path = snapshot / "layer" / WEIGHTS
    path.rename(repo / "blobs" / "abcd")
    path.symlink_to("../../../blobs/abcd")
    assert load_sae(snapshot / "layer").spec.d_sae == D_SAE


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "C:\\x", "a\\..\\x", "a\0b"])
def test_names_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="leaves the folder"):
        safe_reading.inner_file(tmp_path, name)


def test_more_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saelens(tmp_path)
    monkeypatch.setattr(os, "sysconf", lambda name: 16)
    with pytest.raises(UserError, match="more than this machine's memory"):
        safe_reading.safetensors_header(tmp_path / WEIGHTS)


def test_weights_only_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    load = torch.load

    def spy(*arguments: Any, **keywords: Any) -> Any:
        asked.append(keywords)
        return load(*arguments, **keywords)

    monkeypatch.setattr(torch, "load", spy)
    load_sae(pt()(tmp_path))
    assert [keywords["weights_only"] for keywords in asked] == [True]
    asked.clear()
    code_in_pt(tmp_path)
    refusal(tmp_path)
    assert not asked  # refused before torch sees it
