"""The command lines in README.md and in the help run; what the pages name exists."""

import json
import re
import shlex
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from saesteer.checkpoints import SAE
from saesteer.cli.__main__ import VERBS, _help

from .page_commands import our_lines, run_lines

pytestmark = pytest.mark.usefixtures("short_dry_run")

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


@pytest.fixture(autouse=True)
def answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Callable[..., Path]
) -> None:
    """The folder that the lines run in, with the answers that `grade` reads and the tuned model
    that `diff` compares."""
    monkeypatch.chdir(tmp_path)
    Path("tuned-model").symlink_to(tiny_model_dir("llama", seed=1))
    row = {"content": "The old bridge was closed.", "answer": "Le vieux pont était fermé."}
    Path("answers.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")


def help_lines() -> list[list[str]]:
    """The example of every verb's help, and then those of `saesteer --help`."""
    lines = [import_module(f"saesteer.cli.{verb}").EXAMPLE for verb in VERBS]
    lines += [line.strip() for line in _help().split("examples:")[1].splitlines() if line.strip()]
    return [shlex.split(line)[1:] for line in lines]


def test_the_readme_shows_every_verb() -> None:
    assert {words[0] for words in our_lines(README)} == set(VERBS)


@pytest.mark.usefixtures("few_replies", "server_ends")
def test_readme_lines_run_in_order(
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_lines(our_lines(README), tiny_model_dir("llama"), capsys) >= 6


@pytest.mark.usefixtures("few_replies", "server_ends")
def test_help_examples_run_in_order(
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("corpus.jsonl", "held-out.jsonl"):
        rows = [{"text": f"{name}: the heron stood still on day {i}. " * 20} for i in range(40)]
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    verbs, more = help_lines()[: len(VERBS)], help_lines()[len(VERBS) :]
    model = tiny_model_dir("llama")
    assert run_lines(verbs, model, capsys) == len(VERBS) - 1
    again = tmp_path / "again"  # a folder name may come up in both
    again.mkdir()
    (again / "answers.jsonl").write_text(Path("answers.jsonl").read_text())
    monkeypatch.chdir(again)
    assert run_lines(more, model, capsys) >= 1


def test_help_examples_ask_for_no_more_than_the_built_in_corpus_has() -> None:
    from pydoc_data.topics import topics

    # SmolLM2 makes a token of 4.1 characters of this text; a little more leaves some room.
    corpus = sum(map(len, topics.values())) / 4.5
    checked = []
    for words in help_lines():
        if words[0] not in ("harvest", "train") or "--data" in words:
            continue
        flags = dict(zip(words, words[1:], strict=False))
        assert int(flags["--tokens"]) <= corpus * int(flags.get("--epochs", 1)), words
        checked.append(words[0])
    assert set(checked) == {"harvest", "train"}


def named_in(page: Path) -> list[str]:
    """What stands between backticks in the prose of a page."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    return re.findall(r"`([^`\n]+)`", prose)


def slugs(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]*`", "", page.read_text())
    for target, anchor in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", text):
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in slugs(file), f"{page.name} links to {target}#{anchor}"
    tops = "|".join(path.name for path in ROOT.iterdir() if path.is_dir())
    paths = [name for name in named_in(page) if re.fullmatch(rf"(?:{tops})/[\w./-]*", name)]
    # `checkpoints/` is also a folder of Llama Scope's files.
    missing = {name for name in paths if not (ROOT / name).exists()}
    assert missing <= {"checkpoints/final.safetensors"}, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_names_and_flags_exist(page: Path) -> None:
    text = page.read_text()
    calls = re.findall(r"\b(sae|steering|mechanisms|checkpoints)((?:\.[A-Za-z]\w*)+)\(", text)
    calls += [
        (found[1], found[2])
        for name in named_in(page)
        if (found := re.match(r"(?:saesteer\.)?(steering|checkpoints)((?:\.[A-Za-z_]\w*)+)", name))
    ]
    for room, names in calls:
        if room == "sae" and hasattr(SAE, names.split(".")[1]):
            continue  # a variable of that name
        value: object = import_module(f"saesteer.{room}")
        for name in names.split(".")[1:]:
            if not hasattr(value, name):
                import_module(f"{value.__name__}.{name}")  # type: ignore[attr-defined]
            value = getattr(value, name)
    sources = [*(ROOT / "cli").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    ours = "".join(source.read_text() for source in [*sources, ROOT / "tests" / "conftest.py"])
    # Of mypy, pytest, pip, torchrun, Slurm and other trainers; an axis of benchmarks/defaults.py.
    others = {"--strict", "--pdb", "--no-deps", "--nproc-per-node", "--learning-rate", "--length"}
    others |= {"--gpus", "--time", "--signal", "--requeue", "--max-restarts", "--dependency"}
    others |= {"--parsable"}
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)) - others
    # A flag that is on or off is written once, without its `no-`.
    unknown = {flag.replace("--no-", "--") for flag in flags if f'"{flag}"' not in ours}
    assert {flag for flag in unknown if f'"{flag}"' not in ours} == set()


def test_the_way_of_a_token_names_functions_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text().split("## One token")[1].split("\n## ")[0]
    steps = re.findall(r"^\d+\. `(\S+\.py)`(.*)$", text, flags=re.M)
    assert len(steps) == 15
    for path, does in steps:
        file = ROOT / ("" if path.startswith("kernels/") else "sae") / path
        for name in re.findall(r"`([\w.]+)`", does):
            for part in name.split("."):
                defined = rf"^ *(?:def|class) {part}\b"
                assert re.search(defined, file.read_text(), flags=re.M), f"{path}: {name}"
