"""The commands on a page, and how they are run small: on a tiny random model, a few tokens.

A block that is not run says why, in a comment on the line before it:

    <!-- not run: needs a GPU -->
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from saesteer.cli.__main__ import main

BUILT_IN = "smollm2-135m-instruct"
"""The model of the pages; the tiny one takes its place."""

SMALLER = {
    "--tokens": "3000",
    "--d-sae": "64",
    "--layer": "2",
}
"""What makes a line small enough for a tiny random model; the verb's other flags stay."""

EXTRA = {
    "doctor": ["--context", "32", "--batch-size", "4"],
    "harvest": ["--context", "32", "--batch-size", "4", "--dtype", "float32"],
    "train": ["--k", "8", "--batch-tokens", "256"],
    "metrics": ["--context", "32", "--batch-size", "4", "--bootstrap", "20"],
    # A random model passes no check, and two contents are enough to rank something.
    "rank": ["--all-replies", "--rank-contents", "2", "--max-new-tokens", "4"],
    "steer": ["--max-new-tokens", "4"],
    "sweep": ["--grid", "k=1", "--grid", "scale=1", "--rounds", "1:1"],
    "find": [
        "--budget-minutes",
        "0.001",
        "--train-contents",
        "4",
        "--dev-contents",
        "2",
        "--n",
        "2",
        "--batch-size",
        "12",
    ],
    "latents": ["--context", "32", "--batch-size", "4", "--steer", "1"],
    "serve": ["--port", "0"],
    "toy": ["--scenes", "16", "--steps", "2", "--every", "2"],
    "probe": ["--shuffles", "1", "--folds", "2", "--contents", "1", "--n-init", "1"],
    "attribute": ["--n", "2", "--max-new-tokens", "5"],
    "diff": ["--k", "4", "--what", "concepts"],
    "circuit": ["--draws", "1", "--random", "1"],
    "evaluate": ["--n", "1", "--random-draws", "1", "--controls", "random"],
}
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+?) -->\n+)?"
    r"^```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^```",
    flags=re.S | re.M,
)
_SHELL = ("sh", "console", "bash")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    body: str
    reason: str | None
    """Why it is not run."""

    @property
    def is_shell(self) -> bool:
        """Whether it holds commands: it says so, or it begins with one of ours."""
        return self.language in _SHELL or (not self.language and self.body.startswith("saesteer "))

    def commands(self) -> list[list[str]]:
        """The words of each command, lines that are continued joined, without comments."""
        lines = self.body.replace("\\\n", " ").splitlines()
        words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
        return [one for one in words if one]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    found = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(one["language"], one["body"], one["reason"]) for one in found]


def our_lines(page: Path) -> list[list[str]]:
    """The `saesteer` commands of the page that are run, without the word `saesteer`."""
    return [
        words[1:]
        for block in blocks(page)
        if block.is_shell and block.reason is None
        for words in block.commands()
        if words[0] == "saesteer"
    ]


def small(words: Sequence[str], model: Path) -> list[str]:
    """A command with the tiny model and small numbers."""
    line = [str(model) if word == BUILT_IN else word for word in words]
    for i, word in enumerate(line[:-1]):
        if word in SMALLER:
            line[i + 1] = SMALLER[word]
    if "--model" not in line and line[0] in ("harvest", "doctor"):
        line += ["--model", str(model)]
    return line + EXTRA.get(line[0], [])


def run_lines(lines: Sequence[Sequence[str]], model: Path, capsys) -> int:  # type: ignore[no-untyped-def]
    """Run commands in order, small; returns how many ran. The demo needs a model that follows
    instructions: the slow suite runs it."""
    ran = 0
    for words in lines:
        if words[0] == "demo":
            continue
        status = main(small(words, model))
        out, err = capsys.readouterr()
        assert status == 0, f"saesteer {shlex.join(words)} gave {status}: {err[-400:]}"
        assert out.strip(), f"saesteer {shlex.join(words)} printed nothing"
        ran += 1
    return ran
