"""The way in: verbs, exit statuses, one-line errors."""

import importlib
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from saesteer.checkpoints.errors import Interrupted, UsageError, UserError
from saesteer.cli.__main__ import VERBS, make_parser

from .conftest import Cli


def pretend(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let `doctor` end with this error."""

    def run(args: Namespace) -> int:
        raise error

    monkeypatch.setattr(importlib.import_module("saesteer.cli.doctor"), "run", run)


def test_without_a_verb_help_is_shown(cli: Cli) -> None:
    for words in ([], ["--help"], ["-h"], ["help"]):
        outcome = cli(*words)
        assert (outcome.status, outcome.err) == (0, "")
        for verb, summary in VERBS.items():
            assert f"  {verb}" in outcome.out
            assert summary in outcome.out


def test_every_verb_has_help(cli: Cli) -> None:
    for verb in VERBS:
        outcome = cli(verb, "--help")
        assert (outcome.status, outcome.err) == (0, "")
        assert cli("help", verb) == outcome
        assert outcome.out.startswith(f"usage: saesteer {verb}")


def test_version(cli: Cli) -> None:
    assert cli("--version").out.startswith("saesteer ")
    assert cli("-V") == cli("--version")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "tcsh"])
def test_completion_knows_verbs_and_flags(cli: Cli, shell: str) -> None:
    script = cli("--completion", shell)
    assert (script.status, script.err) == (0, "")
    for word in (*VERBS, "rank-contents", "isolate-documents"):
        assert word in script.out


def test_completion_for_another_shell(cli: Cli) -> None:
    for words in (["csh"], [], ["bash", "zsh"]):
        assert "--completion takes one shell of bash, " in cli("--completion", *words).error(2)


def test_a_shell_completes(cli: Cli, tmp_path: Path) -> None:
    """The script at work, in bash."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash here")
    (tmp_path / "complete").write_text(cli("--completion", "bash").out)

    def offered(*words: str) -> list[str]:
        function = "$(complete -p saesteer | sed 's/.*-F \\([^ ]*\\).*/\\1/')"
        asked = (
            f"source {tmp_path / 'complete'}; COMP_WORDS=({' '.join(words)}); "
            f"COMP_CWORD={len(words) - 1}; {function}; "
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        done = subprocess.run([bash, "-c", asked], capture_output=True, text=True, timeout=60)
        return done.stdout.split()

    assert offered("saesteer", "st") == ["steer"]
    assert "--baseline" in offered("saesteer", "steer", "--ba")


def test_usage_lines_name_what_is_needed(cli: Cli) -> None:
    """Each flag in a usage line exists; leaving all of them out is an error."""
    for verb in VERBS:
        usage = cli(verb, "--help").out.splitlines()[0]
        named = set(re.findall(r"(?<!\w)--?[a-z][\w-]*", usage))
        assert named <= set(make_parser(verb).flags()), verb
        if usage != f"usage: saesteer {verb} [flags]":
            assert cli(verb).error(2), verb


def test_unknown_verb(cli: Cli) -> None:
    line = cli("tarin").error(2)
    assert "unknown verb 'tarin': did you mean train?" in line
    assert all(verb in line for verb in VERBS)
    assert "the verb comes first" in cli("--model", "x", "train").error(2)


def test_wrong_flag(cli: Cli) -> None:
    assert cli("train", "--modle", "x").error(2) == (
        "error: train has no flag --modle: did you mean --model?"
    )


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("no\nluck"), 1, "error: no luck"),
        (UsageError("--x is wrong"), 2, "error: --x is wrong"),
        (Interrupted("stopped; --resume"), 130, "error: stopped; --resume"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (
            TypeError("a\nb"),
            1,
            "error: unexpected TypeError: a b (run with -v for the traceback)",
        ),
        (
            MemoryError(),
            1,
            "error: out of memory: lower --batch-size, --batch-tokens or --context, "
            "or change --device",
        ),
        (KeyError(), 1, "error: KeyError() (run with -v for the traceback)"),
    ],
)
def test_errors_are_one_line(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, line: str
) -> None:
    pretend(monkeypatch, error)
    assert cli("doctor").error(status) == line


def test_verbose_shows_the_traceback(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, UserError("no luck"))
    outcome = cli("doctor", "-v")
    assert outcome.status == 1
    assert outcome.err.startswith("Traceback")
    assert outcome.err.endswith("error: no luck\n")


def test_as_a_program(tmp_path: Path) -> None:
    """`python -m saesteer.cli`, with its exit status and nothing on stdout."""
    command = [sys.executable, "-P", "-m", "saesteer.cli"]
    done = subprocess.run([*command, "tran"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown verb 'tran': did you mean train?")
    assert done.stderr.count("\n") == 1


def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = (
        "import sys; sys.argv = ['saesteer']\n"
        "from saesteer.cli.__main__ import main\n"
        "import saesteer.cli.__main__ as m\n"
        "def run(verb, words):\n"
        "    while True:\n"
        "        print('x' * 1000)\n"
        "m._run = run\n"
        "sys.argv = ['saesteer', 'doctor']\n"
        "sys.exit(main())\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None and child.stderr is not None
    child.stdout.readline()
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait() == 1
