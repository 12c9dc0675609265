"""The command lines in README.md do what they say, on a tiny model and in small sizes."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from saesteer.cli.__main__ import main

README = Path(__file__).parent.parent / "README.md"

# What makes a README line small enough for a tiny random model; the verb's other flags stay.
SMALLER = {
    "--tokens": "3000",
    "--d-sae": "64",
    "--layer": "2",
}
EXTRA = {
    "doctor": ["--context", "32", "--batch-size", "4"],
    "harvest": ["--context", "32", "--batch-size", "4", "--dtype", "float32"],
    "train": ["--k", "8", "--batch-tokens", "256"],
    "metrics": ["--context", "32", "--batch-size", "4", "--bootstrap", "20"],
    # A random model passes no check, and two contents are enough to rank something.
    "rank": ["--all-replies", "--rank-contents", "2", "--max-new-tokens", "4"],
    "steer": ["--max-new-tokens", "4"],
}


def readme_lines() -> list[list[str]]:
    """Every `saesteer` line of the fenced blocks, continuation lines joined."""
    blocks = re.findall(r"```(?:sh|console)\n(.*?)```", README.read_text(), flags=re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    lines = [line.removeprefix("$ ").strip() for line in text.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("saesteer ")]


def small(words: list[str], model: Path) -> list[str]:
    """The line with the tiny model and small numbers."""
    words = [str(model) if word == "smollm2-135m-instruct" else word for word in words]
    for i, word in enumerate(words[:-1]):
        if word in SMALLER:
            words[i + 1] = SMALLER[word]
    if "--model" not in words and words[0] in ("harvest", "doctor"):
        words += ["--model", str(model)]
    return words + EXTRA.get(words[0], [])


@pytest.fixture
def few_replies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tiny model answer a handful of prompts with a few tokens."""
    from saesteer.sae import harvester
    from saesteer.sae.replies import ReplyConfig, sample_replies

    def few(lm, prompts, folder, config, progress):  # type: ignore[no-untyped-def]
        return sample_replies(lm, prompts[:8], folder, ReplyConfig(max_new_tokens=6), progress)

    monkeypatch.setattr(harvester, "sample_replies", few)


def test_the_readme_shows_every_verb() -> None:
    from saesteer.cli.__main__ import VERBS

    assert {words[0] for words in readme_lines()} == set(VERBS)


@pytest.mark.usefixtures("few_replies")
def test_readme_lines_run_in_order(
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tiny_model_dir("llama")
    monkeypatch.chdir(tmp_path)
    ran = []
    for words in readme_lines():
        if words[0] == "demo":  # needs a model that follows instructions: the slow suite runs it
            continue
        status = main(small(words, model))
        out, err = capsys.readouterr()
        assert status == 0, f"saesteer {shlex.join(words)} gave {status}: {err[-400:]}"
        assert out.strip(), f"saesteer {shlex.join(words)} printed nothing"
        ran.append(words[0])
    assert len(ran) >= 6
