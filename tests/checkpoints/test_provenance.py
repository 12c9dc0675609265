"""Versions and the source's revision."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from saesteer.checkpoints import provenance


def test_versions_are_those_installed() -> None:
    found = provenance.versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == metadata.version("torch")
    assert found["sae_lens"] == metadata.version("sae-lens")
    assert found["platform"] == platform.platform()


def test_a_missing_package_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(provenance._DISTRIBUTIONS, "triton", "no-such-distribution-anywhere")
    assert provenance.versions()["triton"] is None


def test_revision_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "checkpoints" / "provenance.py"
    source.parent.mkdir()
    source.write_text("# the code\n")
    monkeypatch.setattr(provenance, "__file__", str(source))
    assert provenance.git_revision() is None

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    assert provenance.git_revision() == git("rev-parse", "HEAD")
    source.write_text("# other code\n")
    assert provenance.git_revision() == git("rev-parse", "HEAD") + "+changes"


def test_without_git_there_is_no_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "checkpoints" / "provenance.py"))
    monkeypatch.setenv("PATH", "")
    assert provenance.git_revision() is None
