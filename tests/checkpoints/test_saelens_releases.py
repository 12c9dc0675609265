"""Releases that SAELens lists are read without running what lies in them."""

import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints import saelens_releases
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import load_sae


class _Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_a_pickle_of_a_release_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"weights": _Bomb(tmp_path / "ran")}, tmp_path / "ae.pt")

    def from_pretrained(release: str, sae_id: str, device: str) -> Any:
        return torch.load(tmp_path / "ae.pt")

    lens = types.SimpleNamespace(SAE=types.SimpleNamespace(from_pretrained=from_pretrained))
    monkeypatch.setattr(saelens_releases, "import_sae_lens", lambda: lens)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(UserError, match="`sae` some-release:id"):
        saelens_releases.load_release("some-release:id")
    assert not (tmp_path / "ran").exists()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """SAELens' list, as far as these tests need it."""
    releases = {
        "gemma-res": saelens_releases._Release("google/gemma", ["layer_1/16k", "layer_2/16k"]),
        "gemma-att": saelens_releases._Release("google/gemma", ["layer_1/a"]),
    }
    monkeypatch.setattr(saelens_releases, "_listed", lambda: releases)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gemma-res", "is a release of 2 SAEs: write RELEASE:ID, such as gemma-res:layer_2/16k"),
        ("google/gemma", "SAELens lists as gemma-res, gemma-att: write RELEASE:ID, such as gemma-"),
        ("gema-res", "does not exist (did you mean gemma-res?)"),
        ("nowhere", "does not exist: give a folder with cfg.json"),
        ("gemma-res:layer_1/61k", "2 SAEs and none of that id; the nearest are layer_1/16k, layer"),
        ("gema-res:layer_1/16k", "lists no release gema-res (did you mean gemma-res?)"),
        ("gemma-res:layer_1/16k", "it is not on this machine and the Hub cannot be reached"),
        ("other/repo:layer_1", "it is not on this machine and the Hub cannot be reached"),
    ],
)
def test_names_that_open_no_release(name: str, says: str) -> None:
    pytest.importorskip("sae_lens")
    with pytest.raises(UserError) as error:
        load_sae(name)
    assert str(error.value).startswith(f"`sae` {name}") and says in str(error.value)


def test_the_list_in_the_package_is_understood() -> None:
    pytest.importorskip("sae_lens")
    listed = saelens_releases._listed()
    assert listed["gemma-scope-2b-pt-res-canonical"].repo == "google/gemma-scope-2b-pt-res"
    assert "layer_20/width_16k/canonical" in listed["gemma-scope-2b-pt-res-canonical"].ids
