"""The command lines in README.md and in the help run; what the pages name exists."""

import json
import re
import shlex
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from saesteer.checkpoints import SAE
from saesteer.cli.__main__ import VERBS, _help, main

pytestmark = pytest.mark.usefixtures("short_dry_run")

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]

# What makes a line small enough for a tiny random model; the verb's other flags stay.
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
    "latents": ["--context", "32", "--batch-size", "4", "--steer", "1"],
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
    "serve": ["--port", "0"],
    "toy": ["--scenes", "16", "--steps", "2", "--every", "2"],
    "vector": ["--n", "2", "--layer", "2", "--sets", "1"],
    "probe": ["--shuffles", "1", "--folds", "2", "--contents", "1", "--n-init", "1"],
    "attribute": ["--n", "2", "--max-new-tokens", "5"],
    "diff": ["--k", "4", "--what", "concepts"],
    "circuit": ["--draws", "1", "--random", "1"],
    "evaluate": ["--n", "1", "--random-draws", "1", "--controls", "random"],
}


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


def readme_lines() -> list[list[str]]:
    """Every `saesteer` line of the fenced blocks, continuation lines joined."""
    blocks = re.findall(r"```(?:sh|console)\n(.*?)```", README.read_text(), flags=re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    lines = [line.removeprefix("$ ").strip() for line in text.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("saesteer ")]


def help_lines() -> list[list[str]]:
    """The example of every verb's help, and then those of `saesteer --help`."""
    lines = [import_module(f"saesteer.cli.{verb}").EXAMPLE for verb in VERBS]
    lines += [line.strip() for line in _help().split("examples:")[1].splitlines() if line.strip()]
    return [shlex.split(line)[1:] for line in lines]


def run_all(lines: list[list[str]], model: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """Run the lines in order, small; returns how many ran."""
    ran = 0
    for words in lines:
        if words[0] == "demo":  # needs a model that follows instructions: the slow suite runs it
            continue
        status = main(small(words, model))
        out, err = capsys.readouterr()
        assert status == 0, f"saesteer {shlex.join(words)} gave {status}: {err[-400:]}"
        assert out.strip(), f"saesteer {shlex.join(words)} printed nothing"
        ran += 1
    return ran


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
    from saesteer.sae.activations import reader as stream
    from saesteer.sae.text.replies import ReplyConfig, sample_replies

    def few(lm, prompts, folder, config, progress):  # type: ignore[no-untyped-def]
        return sample_replies(lm, prompts[:8], folder, ReplyConfig(max_new_tokens=6), progress)

    monkeypatch.setattr(stream, "sample_replies", few)


def test_the_readme_shows_every_verb() -> None:
    assert {words[0] for words in readme_lines()} == set(VERBS)


@pytest.mark.usefixtures("few_replies", "server_ends")
def test_readme_lines_run_in_order(
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_all(readme_lines(), tiny_model_dir("llama"), capsys) >= 6


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
    assert run_all(verbs, model, capsys) == len(VERBS) - 1
    again = tmp_path / "again"  # a folder name may come up in both
    again.mkdir()
    (again / "answers.jsonl").write_text(Path("answers.jsonl").read_text())
    monkeypatch.chdir(again)
    assert run_all(more, model, capsys) >= 1


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
    # Of mypy, pytest, pip, torchrun and other trainers; an axis of benchmarks/defaults.py.
    others = {"--strict", "--pdb", "--no-deps", "--nproc-per-node", "--learning-rate", "--length"}
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
