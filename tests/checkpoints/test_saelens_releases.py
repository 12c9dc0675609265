"""Releases that SAELens lists are read without running what lies in them."""

import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints import saelens_releases
from saesteer.checkpoints.errors import UserError


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
