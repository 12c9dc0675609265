"""Runs command lines inside the test process and captures their output."""

import contextlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Outcome:
    """Exit status and output of a command line."""

    status: int
    out: str
    err: str

    def json(self) -> Any:
        """The one JSON document on stdout."""
        assert self.status == 0, self.err
        return json.loads(self.out)

    def error(self, status: int) -> str:
        """The error line: the only output of a run that failed with this status."""
        assert (self.status, self.out) == (status, ""), self.out + self.err
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in self.err
        return lines[0]


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run `saesteer` with these words, as the console script does."""

    def run(*words: object) -> Outcome:
        from saesteer.cli.__main__ import main

        monkeypatch.setattr(sys, "argv", ["saesteer", *map(str, words)])
        capsys.readouterr()
        status = main()
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run


OnTerminal = Callable[..., tuple[int, str]]


def plain_text(seen: str) -> str:
    """What a terminal was sent, without colours, cursor movements and carriage returns."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen).replace("\r", "")


@pytest.fixture
def on_terminal(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> OnTerminal:
    """Run `saesteer` with stdout and stderr on a terminal: the status, and what a person sees."""
    pty = pytest.importorskip("pty", reason="no terminals of this kind here")

    def run(*words: object) -> tuple[int, str]:
        person, ours = pty.openpty()
        seen: list[bytes] = []

        def watch() -> None:
            with contextlib.suppress(OSError):  # how Linux says that the other end is closed
                while piece := os.read(person, 4096):
                    seen.append(piece)

        watcher = threading.Thread(target=watch)
        watcher.start()
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        with (
            os.fdopen(ours, "w", encoding="utf-8") as terminal,
            contextlib.redirect_stdout(terminal),
            contextlib.redirect_stderr(terminal),
            monkeypatch.context() as patched,
        ):
            patched.setattr(sys, "__stdout__", terminal)
            status = cli(*words).status
        watcher.join()
        os.close(person)
        return status, b"".join(seen).decode()

    return run


def run_once(*words: object) -> None:
    """Run a command line that has to succeed, for fixtures of the whole session."""
    from saesteer.cli.__main__ import main

    assert main([*map(str, words), "-q"]) == 0


@pytest.fixture(scope="session")
def model(tiny_model_dir: Callable[..., Path]) -> Path:
    """The folder of a tiny Llama: 4 blocks, width 32, with a chat template."""
    return tiny_model_dir("llama")


@pytest.fixture(scope="session")
def acts(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of layers 1 and 3: 6,000 tokens. Read only."""
    folder = tmp_path_factory.mktemp("cli") / "acts"
    run_once("harvest", "--model", model, "--layer", "1,3", "--tokens", 6000, "--context", 64,
             "--dtype", "float32", "-o", folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def sae(acts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE of layer 1 with 64 latents. Read only."""
    folder = tmp_path_factory.mktemp("cli") / "sae"
    run_once("train", "--activations", acts, "--layer", 1, "--d-sae", 64, "--k", 4,
             "--tokens", 6400, "--batch-tokens", 128, "-o", folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task with few contents, for quick ranking; every reply with a word passes its check."""
    contents = "\n".join(
        f"- {{text: 'The {thing} was late again.', split: {split}}}"
        for thing, split in zip(
            ("train", "bus", "ferry", "tram", "plane", "coach"),
            ("train", "train", "train", "train", "dev", "test"),
            strict=True,
        )
    )
    path = tmp_path_factory.mktemp("cli") / "task.yaml"
    path.write_text(
        "name: late\n"
        "instruction: Answer in French.\n"
        "variants: [{text: Reply in French., lang: en}]\n"
        "check: {name: length}\n"
        f"contents:\n{contents}\n"
        "max_new_tokens: 8\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def plan(model: Path, sae: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of three latents. Read only."""
    folder = tmp_path_factory.mktemp("cli") / "plan"
    run_once("rank", "--model", model, "--sae", sae, "--task", task, "--dtype", "float32",
             "--by", "rate", "--read", "span", "--top", 3, "-o", folder)  # fmt: skip
    return folder
