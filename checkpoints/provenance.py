"""The circumstances of a run, for its record: software versions, source revision, machine."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

_DISTRIBUTIONS = {
    "saesteer": "saesteer",
    "torch": "torch",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "sae_lens": "sae-lens",
    "triton": "triton",
    "numpy": "numpy",
    "numba": "numba",
    "safetensors": "safetensors",
    "datasets": "datasets",
}


def versions() -> dict[str, str | None]:
    """Versions of Python, saesteer and the libraries it computes with, and the platform.

    A distribution that is not installed is None. Imports none of them.
    """
    installed: dict[str, str | None] = {"python": platform.python_version()}
    for name, distribution in _DISTRIBUTIONS.items():
        try:
            installed[name] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            installed[name] = None
    return {**installed, "platform": platform.platform()}


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


def machine() -> dict[str, Any]:
    """Further facts that a bit-exact result depends on: processor, instructions, threads, GPU.

    Those of torch are included only when it has been imported already.
    """
    facts: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count()}
    torch = sys.modules.get("torch")
    if torch is not None:
        facts["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
        facts["threads"] = torch.get_num_threads()
        facts["deterministic"] = torch.are_deterministic_algorithms_enabled()
        if torch.cuda.is_available():
            facts["gpu"] = torch.cuda.get_device_name()
            facts["cuda"] = torch.version.cuda
    return facts


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
