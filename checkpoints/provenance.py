"""What a run was made with: versions of the software, and the revision of the source."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_DISTRIBUTIONS = {
    "saesteer": "saesteer",
    "torch": "torch",
    "transformers": "transformers",
    "sae_lens": "sae-lens",
    "triton": "triton",
    "numpy": "numpy",
}


def versions() -> dict[str, str | None]:
    """Versions of Python, saesteer and what it computes with, and the platform.

    A distribution that is not installed is None. Imports none of them.
    """
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, distribution in _DISTRIBUTIONS.items():
        try:
            found[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            found[name] = None
    return {**found, "platform": platform.platform()}


def git_revision() -> str | None:
    """The commit that saesteer runs from, with "+changes" when files differ from it.

    None when this is not a checkout of its source (an installed wheel) or git is missing.
    """
    top = Path(__file__).resolve().parent.parent
    if not (top / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command: list[Any] = ["git", "-C", top, *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        revision = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return revision + ("+changes" if changed else "")
