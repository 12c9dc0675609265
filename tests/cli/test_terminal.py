"""What every verb prints is printed on a terminal once: colours, bars and tables, as people see."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from saesteer.cli.__main__ import VERBS

from .conftest import OnTerminal, plain_text, run_once

IFEVAL = {
    "key": 1,
    "prompt": "Write without commas.",
    "instruction_id_list": ["punctuation:no_comma"],
    "prompt_without_instruction": "Write.",
    "kwargs": [{}],
}
QUICK = "--temperature 0 --dtype float32"
LINES: dict[str, list[tuple[str, str]]] = {
    "harvest": [
        ("--model MODEL --layer 1 --tokens 500 --context 64 --dtype float32 -o NEW", "stored 500"),
    ],
    "train": [
        ("--activations ACTS --d-sae 64 --k 4 --tokens 512 --batch-tokens 128 -o NEW", "next:"),
        (
            "--activations ACTS --layer 1 --arch jumprelu --d-sae 64 --tokens 512 "
            "--batch-tokens 128 -o NEW",
            "held-out L0",
        ),
    ],
    "metrics": [("--sae SAE --tokens 300 --context 64 --dtype float32 -o NEW", "dead_fraction")],
    "rank": [
        ("--sae SAE --task TASK --read span --by rate --top 3 --explain 3 --drop dense", "latent"),
        ("--sae SAE --task TASK --read span --by rate --top 3 -o NEW", "which is few"),
    ],
    "steer": [("--plan PLAN -p Hello --baseline --max-new-tokens 4", "unsteered")],
    "sweep": [
        (
            f"--plan PLAN --task TASK --grid k=1 --grid scale=1 --rounds 1:1 {QUICK} "
            "--budget kl=1e-9 -o NEW",
            "no setting keeps to the budget",
        ),
    ],
    "evaluate": [
        (
            f"--plan PLAN --task TASK --n 1 --random-draws 1 {QUICK} --ifeval IFEVAL "
            "--ifeval-only punctuation:no_comma --max-new-tokens 4 -o NEW",
            "IFEval: 1 prompts",
        ),
    ],
    "grade": [("--task question --answers ANSWERS", "follows")],
    "find": [
        (
            "--model MODEL --task TASK --budget-minutes 0.001 --train-contents 4 --dev-contents 2 "
            "--n 2 --batch-size 12 --dtype float32 -o NEW",
            "settings tried",
        )
    ],
    "convert": [
        ("--from SAE --to NEW --format sparsify", "allowed:"),
        ("--from PLAN --to NEW --format lm-eval --as-scope all", "written to"),
    ],
    "doctor": [("--sae SAE --tokens 1000 --context 64 --dtype float32 -o NEW", "ok  ")],
    "push": [("--sae SAE --repo NEW", "SHA-256")],
    "reproduce": [("CHANGED", "DIFFER")],
    "latents": [
        (
            "--sae SAE --tokens 300 --context 64 --top 3 --steer 1 --dtype float32 -o NEW",
            "index.html",
        )
    ],
    "patch": [("--model HAND/model --pairs HAND/scenes.jsonl --site z -o NEW", "z 1.1 at last")],
    "circuit": [
        (
            "--model HAND/model --pairs HAND/scenes.jsonl --groups HAND/groups.yaml --draws 1 "
            "--random 1 -o NEW",
            "faithfulness",
        )
    ],
    "serve": [("--plan one=PLAN --sae SAE --port 0", "serving ")],
    "toy": [
        ("hand-built --scenes 8 -o NEW", "next:"),
        ("instructions --scenes 8 --steps 2 -o NEW", "next:"),
    ],
    "trace": [
        ("--model HAND/model --prompt boxes --tau 0.5 -o NEW", "explain"),
        ("--model HAND/model --pairs HAND/scenes.jsonl --at object --n 2", "mass read"),
    ],
    "probe": [
        (
            "--model MODEL --tasks french,question --contents 1 --at last --folds 2 --shuffles 1 "
            "-o NEW",
            "bag of words",
        ),
    ],
    "attribute": [("--model MODEL --task french --n 1 --max-new-tokens 5 -o NEW", "random span")],
    "diff": [("--base MODEL --tuned TUNED --what concepts --k 4 --top 3 -o NEW", "overlap")],
    "watch": [("SAE", "finished")],
    "tasks": [("", "french")],
    "formats": [("", "saelens")],
    "models": [("", "smollm2-135m-instruct")],
}
FAILS = {"CHANGED"}


def test_every_verb_has_a_line() -> None:
    assert {*LINES, "demo"} == set(VERBS)  # demo's own test runs on a terminal


@pytest.mark.usefixtures("server_ends")
@pytest.mark.parametrize(
    ("line", "says"),
    [(f"{verb} {rest}", says) for verb, rows in LINES.items() for rest, says in rows],
)
def test_verbs_print_on_a_terminal(
    line: str,
    says: str,
    on_terminal: OnTerminal,
    model: Path,
    acts: Path,
    sae: Path,
    plan: Path,
    task: Path,
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
) -> None:
    ifeval, changed = tmp_path / "ifeval.jsonl", tmp_path / "changed"
    ifeval.write_text(json.dumps(IFEVAL) + "\n")
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"content": "It rains.", "answer": "Does it rain?"}) + "\n")
    names = {
        "MODEL": model, "ACTS": acts, "SAE": sae, "PLAN": plan, "TASK": task, "IFEVAL": ifeval,
        "NEW": tmp_path / "new", "CHANGED": changed, "ANSWERS": answers,
        "TUNED": tiny_model_dir("llama", seed=1),
    }  # fmt: skip
    names |= {f"one={name}": f"one={path}" for name, path in names.items()}
    words = line.split()
    if "HAND/" in line:
        run_once("toy", "hand-built", "--scenes", 16, "-o", tmp_path / "hand")
        words = [word.replace("HAND", str(tmp_path / "hand")) for word in words]
    if "CHANGED" in words:
        shutil.copytree(sae, changed)
        log = changed / "metrics.jsonl"
        log.write_text(log.read_text().replace('"step": 20,', '"step": 21,', 1))
    status, seen = on_terminal(*(names.get(word, word) for word in words))
    assert status == (1 if FAILS & set(words) else 0), seen
    plain = plain_text(seen)
    assert says in plain and "Traceback" not in plain and "unexpected" not in plain
    assert "\x1b[" in seen  # it was taken for a terminal


def test_warnings_and_errors_on_a_terminal(on_terminal: OnTerminal, sae: Path) -> None:
    status, seen = on_terminal("metrics", "--sae", sae, "--tokens", 300, "--context", 2000)
    assert status == 2 and "\x1b[31merror:\x1b[0m --context must be at most" in seen
    assert "Traceback" not in seen
