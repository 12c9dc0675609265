"""Every command and every Python block on the pages is run, small, or says why it is not."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .page_commands import BUILT_IN, Block, blocks, our_lines, run_lines

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
GIVEN = {
    "evaluation": {"runs/plan": "plan"},
    "formats": {"runs/acts": "acts", "trainer_0": "dictionary", "runs/french": "plan"},
    "ranking": {"runs/sae": "sae"},
    "steering": {"runs/plan": "plan", "runs/other-plan": "plan"},
    "own-instruction": {"runs/sae": "sae"},
    "notebook": {"runs/sae": "sae"},
    "cluster": {},
}
"""What lies in a page's folder before its commands run."""

# What makes Python code of a page small enough for a tiny random model, which passes no check.
PYTHON_SMALLER = {
    'load_model("gpt2")': f'load_model("{BUILT_IN}")',
    "gpt2-small-res-jb:blocks.8.hook_resid_pre": "runs/sae",
    "{2421: 60.0}": "{21: 60.0}",
    'read="reply"': 'read="last"',
    "contents=24": "contents=2",
    "max_new_tokens=40": "max_new_tokens=4",
    "ranking.explain(2421)": "ranking.explain(21)",
    "MetricsConfig(tokens=2000)": "MetricsConfig(tokens=200, bootstrap=10)",
    "d_model=256, features=2048": "d_model=16, features=1400",
    "tokens=1_000_000": "tokens=20_000",
    "TrainConfig(d_sae=(1024,), k=(20,))": "TrainConfig(d_sae=(32,), k=(4,), tokens=16_000)",
}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_is_not_run_says_why(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for block in blocks(page):
        if block.reason is not None:
            assert len(block.reason.split()) >= 3, f"{page.name}: {block.reason!r} is no reason"
            continue
        if not block.is_shell:
            continue
        for words in block.commands():
            assert words[0] in ("saesteer", "make"), (
                f"{page.name}: {words} is neither run nor marked"
            )
            if words[0] == "make":
                target = words[1]
                assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.M), target


def test_a_mark_without_a_block_is_noticed() -> None:
    for page in PAGES:
        marks = re.findall(r"^<!-- not run", page.read_text(encoding="utf-8"), flags=re.M)
        assert len(marks) == sum(block.reason is not None for block in blocks(page)), page.name


@pytest.fixture(scope="module")
def made(
    tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Folders that pages begin with: activations, an SAE, a plan, an SAE in another format."""
    from saesteer import checkpoints, sae, steering

    folder = tmp_path_factory.mktemp("made")
    lm = sae.load_model(str(tiny_model_dir("llama")), dtype="float32")
    text = sae.TextConfig(context=32, batch_size=4)
    sae.harvest(lm, folder / "acts", sae.HarvestConfig(layers=(2,), tokens=2000, text=text))
    config = sae.TrainConfig(d_sae=(64,), k=(8,), tokens=2048, batch_tokens=256)
    sae.train(folder / "sae", config, activations=folder / "acts")
    one = checkpoints.load_sae(folder / "sae")
    ranking = steering.rank(lm, one, "french", steering.RankConfig(read="last", contents=2))
    plan = steering.plan_from_ranking(lm, one, ranking, top=3)
    (folder / "plan").mkdir()
    steering.save_ranking(folder / "plan", lm, one, ranking, plan)
    checkpoints.convert(folder / "sae", folder / "dictionary", "dictionary_learning")
    return {name: folder / name for name in ("acts", "sae", "plan", "dictionary")}


def with_files(page: Path, made: dict[str, Path]) -> None:
    """Put what the page reads into the working folder."""
    for target, source in GIVEN.get(page.stem, {}).items():
        shutil.copytree(made[source], target)
    answer = {"content": "The old bridge was closed.", "answer": "Le vieux pont était fermé."}
    Path("answers.jsonl").write_text(json.dumps(answer) + "\n", encoding="utf-8")
    Path("prompts.txt").write_text("The old bridge was closed.\n", encoding="utf-8")
    for block in blocks(page):
        if block.language == "yaml" and (named := re.match(r"# (\S+\.yaml)\n", block.body)):
            Path(named[1]).write_text(block.body, encoding="utf-8")


COMMANDS = [page for page in PAGES if our_lines(page) and page.name != "README.md"]


@pytest.mark.slow
@pytest.mark.usefixtures("short_dry_run", "few_replies")
@pytest.mark.parametrize("page", COMMANDS, ids=name_of)
def test_commands_run_in_order(
    page: Path,
    made: dict[str, Path],
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with_files(page, made)
    assert run_lines(our_lines(page), tiny_model_dir("llama"), capsys) >= 1


@pytest.mark.parametrize("page", COMMANDS, ids=name_of)
def test_commands_have_flags_that_exist(page: Path, tmp_path: Path) -> None:
    """The fast half of the test above: no model, only the parser."""
    from saesteer.cli.__main__ import make_parser

    for verb, *words in our_lines(page):
        make_parser(verb).read(words)


def python_blocks(page: Path) -> list[Block]:
    return [one for one in blocks(page) if one.language == "python" and one.reason is None]


FAST = ("README.md", "notebook.md")
PYTHON = [
    pytest.param(page, marks=() if page.name in FAST else pytest.mark.slow)
    for page in PAGES
    if python_blocks(page)
]


@pytest.mark.parametrize("page", PYTHON, ids=name_of)
def test_python_runs(
    page: Path,
    made: dict[str, Path],
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The blocks of a page share their names, as the cells of a notebook do."""
    monkeypatch.chdir(tmp_path)
    with_files(page, made)
    model = tiny_model_dir("llama")
    names = names_before(page, made, model)
    for block in python_blocks(page):
        code = block.body
        for old, new in PYTHON_SMALLER.items():
            code = code.replace(old, new)
        code = code.replace(BUILT_IN, str(model))
        exec(compile(code, str(page), "exec"), names)


def names_before(page: Path, made: dict[str, Path], model: Path) -> dict[str, Any]:
    """What the code of a page takes as given."""
    if page.stem != "steering":
        if page.name == "README.md":
            Path("runs").mkdir()
            shutil.copytree(made["sae"], "runs/sae")
        return {}
    from saesteer import sae, steering

    lm = sae.load_model(str(model), dtype="float32")
    plan = steering.load_plan(made["plan"])
    return {
        "lm": lm,
        "steering": steering,
        "plan": plan,
        "first": plan,
        "second": plan.with_changes(scale=2.0),
        "inputs": {**lm.tokenizer("The old bridge", return_tensors="pt"), "max_new_tokens": 3},
    }
