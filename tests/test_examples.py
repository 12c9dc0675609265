"""Every example runs on a tiny model, leaves what it says and prints what it found."""

import contextlib
import importlib.util
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

RUN_HERE = {
    "circuit", "doctor", "evaluate", "grade", "harvest", "latents", "load_sae", "metrics",
    "own_task", "patch", "rank", "report", "serve", "steer", "train",
}  # fmt: skip
"""The examples that the tests below run."""

TRAINING = ("--d-sae", "64", "--k", "4", "--tokens", "2000", "--batch-tokens", "100")


def run(name: str, *arguments: object) -> str:
    """Run `main` of one example and return what it prints on stdout."""
    spec = importlib.util.spec_from_file_location(
        f"example_{name.replace('/', '_')}", EXAMPLES / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    printed, progress = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(progress):
        module.main([str(argument) for argument in arguments])
    return printed.getvalue()


def numbers(text: str, pattern: str) -> list[float]:
    """The numbers in the groups of the only match of a pattern."""
    (found,) = re.finditer(pattern, text)
    return [float(group) for group in found.groups()]


@pytest.fixture(scope="module")
def model(tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir("llama")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def trained(model: Path, folder: Path) -> str:
    """What training an SAE printed; the SAE is in `folder / "sae"`."""
    return run(
        "train", "--model", model, "--layer", 1, "--reply-contents", 2, "--context", 32,
        *TRAINING, "-o", folder / "sae",
    )  # fmt: skip


@pytest.fixture(scope="module")
def ranked(model: Path, folder: Path, trained: str) -> str:
    """What ranking printed; the plan is in `folder / "plan"`."""
    return run(
        "rank", "--model", model, "--sae", folder / "sae", "--read", "last", "--contents", 3,
        "--top", 6, "-o", folder / "plan",
    )  # fmt: skip


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == RUN_HERE


def test_patch_draws_a_map_and_circuit_finds_the_known_one(folder: Path) -> None:
    found = run("circuit", "--out", folder / "hand", "--scenes", 16)
    assert "fetcher at last: heads [(1, 1)]" in found and "faithfulness 1.00" in found
    assert "mover at object: heads [(0, 0)]" in found
    pairs = folder / "hand" / "scenes.jsonl"
    printed = run("patch", "--model", folder / "hand" / "model", "--pairs", pairs, "--n", 8,
                  "--out", folder / "patch")  # fmt: skip
    assert "z 1.1 at last: -10.000 logit-diff, 100% of the whole difference" in printed
    assert "<svg" in (folder / "patch" / "report.html").read_text()


def test_a_vector_becomes_two_plans_that_are_graded(
    model: Path, folder: Path, trained: str
) -> None:
    out = folder / "road"
    printed = run("mechanisms/vector_to_plan", "--model", model, "--sae", folder / "sae",
                  "--pairs", 8, "--n", 1, "--out", out)  # fmt: skip
    assert "VectorResult(1 sets x 8 pairs" in printed and "LatentResult(8 runs" in printed
    for arm in ("unsteered", "prompted", "vector", "latents", "mean difference"):
        assert re.search(rf"(?m)^{arm} +follows [\d.]+ \[", printed)
    assert {path.name for path in out.iterdir() if path.is_dir()} == {
        "vector", "latents", "mean-difference"
    }  # fmt: skip


def test_harvest_leaves_shards_that_training_takes(model: Path, folder: Path) -> None:
    out = folder / "activations"
    printed = run(
        "harvest", "--model", model, "--layer", 2, "--tokens", 700, "--context", 32, "-o", out
    )
    assert json.loads((out / "manifest.json").read_text())["tokens"] == 700
    assert "700 activations of width 32" in printed
    assert "first shard of layer 2: (700, 32)" in printed
    (norm,) = numbers(printed, r"median norm ([\d.]+)")
    assert norm > 0
    again = run("train", "--activations", out, *TRAINING, "-o", folder / "from-shards")
    assert (folder / "from-shards" / "sae_weights.safetensors").is_file()
    assert "layer 2, 64 latents, k 4" in again


def test_train_writes_an_sae_that_learned(trained: str, folder: Path) -> None:
    assert "layer 1, 64 latents, k 4" in trained
    config = json.loads((folder / "sae" / "cfg.json").read_text())
    assert (config["d_in"], config["d_sae"], config["k"]) == (32, 64, 4)
    fvu, l0 = numbers(trained, r"FVU ([\d.]+), L0 ([\d.]+)")
    assert 0 < fvu < 1 and 0 < l0 <= 4


def test_metrics_prints_each_figure_with_its_interval(
    model: Path, folder: Path, trained: str
) -> None:
    printed = run(
        "metrics", "--model", model, "--sae", folder / "sae", "--tokens", 400, "--context", 32
    )
    for name in ("fvu", "l0", "ce_recovered", "kl"):
        number = r"(-?[\d.]+)"
        value, low, high = numbers(printed, rf"(?m)^{name} +{number} \[{number}, {number}\]")
        assert low <= value <= high
    (l0,) = numbers(printed, r"(?m)^l0 +([\d.]+)")
    assert 0 < l0 <= 4


def test_latents_shows_some_and_writes_pages(
    model: Path, folder: Path, trained: str, tmp_path: Path
) -> None:
    printed = run(
        "latents", "--model", model, "--sae", folder / "sae", "--tokens", 400, "--context", 32,
        "--top", 4, "--out", tmp_path / "pages",
    )  # fmt: skip
    shown = re.findall(r"(?m)^latent (\d+): density ", printed)
    pages = {path.stem for path in (tmp_path / "pages/latents").iterdir()}
    assert len(shown) == 3 and set(shown) <= pages and len(pages) == 4
    assert f"page: {tmp_path / 'pages/index.html'}" in printed


def test_load_sae_shows_the_latents_of_each_token(model: Path, folder: Path, trained: str) -> None:
    printed = run(
        "load_sae", "--model", model, "--sae", folder / "sae", "-p", "yield it", "--top", 2
    )
    first, *tokens = printed.splitlines()
    assert first.startswith("topk, 64 latents, reads blocks.1.hook_resid_post")
    assert len(tokens) > 1
    for line in tokens:
        found = re.search(r"error (\d\.\d\d)  (\d+) [\d.]+ \[.*; (\d+) [\d.]+ \[", line)
        assert found is not None
        assert all(0 <= int(latent) < 64 for latent in found.groups()[1:])


def test_rank_prints_the_latents_of_the_plan(ranked: str, folder: Path) -> None:
    import yaml

    plan = yaml.safe_load((folder / "plan" / "plan.yaml").read_text())
    printed = [int(i) for i in re.findall(r"(?m)^latent +(\d+)  saif", ranked)]
    assert printed == [latent["id"] for latent in plan["latents"]]
    assert len(printed) == 6
    assert plan["task"]["name"] == "french" and plan["layer"] == 1
    assert "36 positive and 3 negative samples" in ranked  # twelve wordings of three contents


def test_steer_touches_every_generated_position(model: Path, folder: Path, ranked: str) -> None:
    printed = run(
        "steer", "--model", model, "--plan", folder / "plan", "--scale", 3,
        "-p", "A tuple needs a comma.", "--max-new-tokens", 6,
    )  # fmt: skip
    assert "6 latents at layer 1, scope generation" in printed
    lines = dict(line.split(": ", 1) for line in printed.splitlines() if ": " in line)
    assert lines["unsteered"].strip() != lines["steered"].strip()
    touched, dose = numbers(printed, r"touched (\d+) positions, relative dose ([\d.]+)")
    assert 1 <= touched <= 6 and dose > 0
    (by_hand,) = numbers(printed, r"(?m)^touched (\d+) positions$")
    assert 1 <= by_hand <= 6


def test_serve_answers_with_a_plan_and_without(model: Path, folder: Path, ranked: str) -> None:
    printed = run(
        "serve", "--model", model, "--plan", folder / "plan", "-p", "A tuple needs a comma.",
        "--max-new-tokens", 6,
    )  # fmt: skip
    assert re.search(r"(?m)^serving at http://127\.0\.0\.1:\d+$", printed)
    plain, steered = (int(n) for n in re.findall(r"touched (\d+) positions", printed))
    assert plain == 0 and 1 <= steered <= 6


def test_evaluate_chooses_a_setting_and_reports_every_arm(
    model: Path, folder: Path, ranked: str
) -> None:
    out = folder / "evaluation"
    printed = run(
        "evaluate", "--model", model, "--plan", folder / "plan", "--k", 1, 4, "--scale", 2,
        "--dev", 2, "--n", 3, "-o", out,
    )  # fmt: skip
    (chosen, scale) = numbers(printed, r"chosen: k (\d+), scale ([\d.]+)")
    assert chosen in (1, 4) and scale == 2
    report = json.loads((out / "report.json").read_text())
    assert [arm["name"] for arm in report] == ["unsteered", "prompted", "steered"]
    for arm in report:
        assert len(arm["answers"]) == 3
        assert f"{arm['follows'][0]:.2f} [" in printed
        assert (arm["relative_dose"] is not None) == (arm["name"] == "steered")
    kept = (out / "plan" / "plan.yaml").read_text()
    assert kept.count("- id:") == chosen


def test_report_compares_a_plan_with_every_control(model: Path, folder: Path, ranked: str) -> None:
    out = folder / "report"
    printed = run("report", "--model", model, "--plan", folder / "plan", "--n", 1, "-o", out)
    document = json.loads((out / "report.json").read_text())
    (task,) = document["tasks"]
    kinds = {arm["kind"] for arm in task["arms"]}
    assert {"unsteered", "prompted", "steered", "random", "meandiff", "logit-bias"} <= kinds
    for theirs in ("unsteered", "prompted", "random", "mean difference", "logit bias"):
        assert f"{task['task']['name']}: steered - {theirs}: " in printed
    assert "<!doctype html>" in (out / "report.html").read_text()


def test_own_task_is_loaded_graded_and_answered(model: Path) -> None:
    printed = run("own_task", "--model", model, "--n", 2)
    assert "a good answer: pass" in printed
    assert "a bad answer: fail" in printed
    for arm in ("unsteered", "prompted"):
        rate, low, high = numbers(printed, rf"{arm}: follows ([\d.]+) \[([\d.]+), ([\d.]+)\]")
        assert low <= rate <= high
    assert len(re.findall(r"(?m)^  (?:strict|-)  ", printed)) == 4


def test_grade_tells_a_good_answer_from_the_others(tmp_path: Path) -> None:
    printed = run("grade")
    assert re.findall(r"(?m)^  strict (\w+)", printed) == ["True", "False", "False"]
    file = tmp_path / "answers.jsonl"
    file.write_text('{"content": "Seven boats left.", "answer": "SEVEN BOATS LEFT."}\n')
    assert "strict True" in run("grade", "--task", "uppercase", "--answers", file)


def test_doctor_as_a_script_finds_nothing_wrong(model: Path, tmp_path: Path) -> None:
    """In a child: the folder of the examples comes first on its path and must hide nothing."""
    command = [
        sys.executable, EXAMPLES / "doctor.py", "--model", model, "--layer", "1",
        "--tokens", "500", "--context", "16", "--batch-size", "2",
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert len(re.findall(r"(?m)^ok   ", ended.stdout)) == 8
    assert "FAIL" not in ended.stdout
    (tokens,) = numbers(ended.stdout, r"(?m)^tokens: (\d+)$")
    assert tokens == 500
    assert not list(tmp_path.iterdir())


# --- the paper's experiments ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def saif(model: Path, folder: Path) -> Path:
    """SAEs of two layers and two widths, as `prepare.py` leaves them."""
    printed = run(
        "saif/prepare", "--model", model, "--tasks", "json", "--layers", 1, 3, "--widths", 32, 64,
        "--contents", 2, "--tokens", 900, "--train-tokens", 1200, "--batch-tokens", 100, "--k", 4,
        "--context", 32, "-o", folder / "saif",
    )  # fmt: skip
    assert len(re.findall(r"(?m)FVU [\d.]+, L0 [\d.]+$", printed)) == 4
    return folder / "saif"


@pytest.mark.parametrize(
    ("experiment", "saes", "rows"),
    [
        ("latents", ("layer-1_dsae-64",), 5),
        ("layers", ("layer-1_dsae-64", "layer-3_dsae-64"), 2),
        ("width", ("layer-1_dsae-32", "layer-1_dsae-64"), 2),
        ("position", ("layer-1_dsae-64",), 2),
        ("beta", ("layer-1_dsae-64",), 5),
        ("variants", ("layer-1_dsae-64",), 2),
        ("logit-bias", ("layer-3_dsae-64",), 2),
    ],
)
def test_each_experiment_varies_one_thing(
    experiment: str, saes: tuple[str, ...], rows: int, saif: Path
) -> None:
    paths = [next((saif / "sae").glob(f"{name}*")) for name in saes]
    printed = run(
        "saif/run", experiment, "--sae", *paths, "--task", "uppercase", "--read", "span", "--by",
        "rate", "--contents", 2, "--k", 3, "--n", 2, "-o", saif / "results",
    )  # fmt: skip
    written = Path(printed.split("written to ")[1].strip())
    report = json.loads(written.read_text())
    names = [arm["name"] for arm in report["arms"]]
    assert names[:2] == ["unsteered", "prompted"]
    assert len(names) - 2 >= rows and len(set(names)) == len(names)
    assert all(f"{name} " in printed for name in names)


def test_the_page_holds_what_was_measured(model: Path, folder: Path, saif: Path) -> None:
    from saesteer.cli.__main__ import main

    sae = next((saif / "sae").glob("layer-1_dsae-64*"))
    run(
        "saif/run", "variants", "--sae", sae, "--task", "uppercase", "--read", "span", "--by",
        "rate", "--contents", 2, "--k", 2, "--n", 2, "-o", saif / "some",
    )  # fmt: skip
    for words in (
        ("rank", "--sae", sae, "--task", "uppercase", "--by", "rate", "--read", "span",
         "--rank-contents", 2, "--top", 2, "-o", folder / "shouting"),
        ("evaluate", "--plan", folder / "shouting", "--n", 2, "--random-draws", 1, "-o",
         folder / "shouted"),
    ):  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            assert main([*map(str, words), "-q"]) == 0
    out = folder / "page.md"
    run("saif/page", "--results", saif / "some", "--reports", folder / "shouted", "-o", out)
    page = out.read_text(encoding="utf-8")
    report = json.loads((folder / "shouted" / "report.json").read_text())
    steered = next(a for a in report["tasks"][0]["arms"] if a["kind"] == "steered")
    assert f"{steered['damage']['kl']:.2f}" in page
    assert "### variants: uppercase" in page and "| one wording |" in page
    assert "| uppercase | unsteered | " in page


@pytest.mark.slow
def test_several_tasks_in_one_go(saif: Path, folder: Path) -> None:
    """The shell script, small: rank, sweep, evaluate, and a page that holds the rates."""
    import os

    sae = next((saif / "sae").glob("layer-1_dsae-64*"))
    page = folder / "tasks.md"
    small = {
        "OUT": str(folder / "tasks"), "TASKS": "lowercase", "CONTENTS": "2", "N": "1",
        "RANK": "--all-replies --max-new-tokens 4", "ROUNDS": "1:1",
        "EXTRA": "--random-draws 1 --controls random",
    }  # fmt: skip
    found = os.path.dirname(sys.executable)
    environment = {**os.environ, **small, "PATH": f"{found}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", EXAMPLES / "saif" / "tasks.sh", sae, page], capture_output=True, text=True,
        env=environment, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# The SAIF experiments") and "| lowercase | unsteered | " in text


@pytest.mark.parametrize("script", sorted((EXAMPLES / "mechanisms").glob("*.sh")),
                         ids=lambda path: path.name)  # fmt: skip
def test_prepared_commands_parse(script: Path) -> None:
    """Scripts that need models we do not have: their flags exist, and the shell reads them."""
    from saesteer.cli.__main__ import make_parser

    assert subprocess.run(["sh", "-n", script]).returncode == 0
    text = script.read_text().replace("\\\n", " ")
    commands = re.findall(r"^ *saesteer (\w+) (.*)$", text, flags=re.M)
    assert commands
    for verb, words in commands:
        args = make_parser(verb).read([w.strip('"') for w in words.split()])
        assert args.out.startswith("$OUT/")
