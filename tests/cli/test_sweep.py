"""`saesteer sweep` on a tiny model."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from saesteer.steering import load_plan

from .conftest import Cli, run_once

SMALL = ("--rounds", "1:2,1:1", "--temperature", 0, "--dtype", "float32", "-q")


def test_the_table_and_the_files(
    cli: Cli, model: Path, plan: Path, task: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    outcome = cli(
        "sweep", "--model", model, "--plan", plan, "--task", task, *SMALL,
        "--grid", "k=1,2", "--grid", "scale=0.5:1:0.5", "-o", out,
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    header, *rows = outcome.out.splitlines()
    assert header.split()[:5] == ["layer", "k", "beta", "scale", "scope"]
    assert sum(row.startswith("*") for row in rows) == 1
    assert "unsteered " in outcome.out and "prompted " in outcome.out
    assert {path.name for path in out.iterdir()} == {
        "plan.yaml", "plan.safetensors", "sweep.json", "sweep.svg", "run.json", "ranking.json"
    }  # fmt: skip
    document = json.loads((out / "sweep.json").read_text())
    tried = {(row["k"], row["scale"]) for row in document["trials"]}
    assert tried == {(1, 0.5), (1, 1.0), (2, 0.5), (2, 1.0)}
    chosen = load_plan(out)
    assert (len(chosen.latents), chosen.scale) == (
        document["chosen"]["k"], document["chosen"]["scale"]
    )  # fmt: skip
    assert chosen.metrics["sweep"]["settings"] == 4
    ET.fromstring((out / "sweep.svg").read_text())


def test_json_and_a_budget(cli: Cli, model: Path, plan: Path, task: Path) -> None:
    outcome = cli(
        "sweep", "--model", model, "--plan", plan, "--task", task, *SMALL,
        "--grid", "k=1", "--grid", "scale=1", "--budget", "kl=1e-9", "--json",
    )  # fmt: skip
    document = outcome.json()
    assert document["budget"] == {"kind": "kl", "limit": 1e-9}
    assert document["within_budget"] is False and len(document["trials"]) == 2
    assert "warning: no setting keeps to the budget kl=1e-09" in outcome.err


def test_an_sae_is_ranked_here(cli: Cli, model: Path, sae: Path, task: Path) -> None:
    found = cli(
        "sweep", "--sae", sae, "--task", task, *SMALL, "--grid", "k=1", "--grid", "scale=1",
        "--grid", "position=post,pre", "--grid", "by=rate", "--json",
    ).json()  # fmt: skip
    assert {row["plan"] for row in found["trials"]} == {
        "layer 1 post rate", "layer 1 pre rate"
    }  # fmt: skip


def test_layers_are_an_axis_by_the_names_of_saes(
    cli: Cli, acts: Path, sae: Path, task: Path, tmp_path: Path
) -> None:
    run_once("train", "--activations", acts, "--layer", 3, "--d-sae", 64, "--k", 4, "--tokens",
             1280, "--batch-tokens", 128, "-o", tmp_path / "at-3")  # fmt: skip
    (tmp_path / "at-1").symlink_to(sae)
    words = ("sweep", "--task", task, *SMALL, "--grid", "k=1", "--grid", "scale=1", "--grid",
             "by=rate", "--json")  # fmt: skip
    named = ("--sae", tmp_path / "at-{layer}")
    found = cli(*words, *named, "--grid", "layer=1,3").json()
    assert {(row["plan"], row["layer"]) for row in found["trials"]} == {
        ("layer 1 rate", 1), ("layer 3 rate", 3)
    }  # fmt: skip
    said = "--grid layer=... and {layer} in the name of every --sae belong together"
    assert said in cli(*words, *named).error(2)
    assert said in cli(*words, "--sae", sae, "--grid", "layer=1").error(2)
    # Two SAEs of one layer compete too, and bear the names of their folders.
    both = cli(*words, "--sae", tmp_path / "at-1", "--sae", sae).json()
    assert {row["plan"] for row in both["trials"]} == {"at-1 rate", f"{sae.name} rate"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--plan DIR, or --sae DIR with --task: give one, got neither"),
        (("--plan", "a", "--sae", "b"), "give one, got both"),
        (("--sae", "b"), "--task is missing: --sae ranks for a task first"),
        (("--plan", "a", "--grid", "luck=1"), "the axis of --grid must be one of k, beta"),
        (("--plan", "a", "--grid", "read=last"), "--grid read needs --sae"),
        (("--plan", "a", "--grid", "layer=1"), "--grid layer needs --sae"),
        (("--sae", "b", "--task", "t", "--grid", "layer=x"), "--grid layer must be whole numbers"),
        (("--plan", "a", "--grid", "k=1.5"), "--grid k must be whole numbers, got 1.5"),
        (("--plan", "a", "--grid", "k=0"), "--grid k must be at least 1, got 0"),
        (("--plan", "a", "--grid", "k"), "--grid must be AXIS=VALUE,... such as k=1,5,15"),
        (("--plan", "a", "--grid", "beta=2:1:1"), "does not go upwards"),
        (("--plan", "a", "--grid", "scale=0"), "--grid scale=0 would steer nothing"),
        (("--plan", "a", "--grid", "scope=often"), "--scope"),
        (("--plan", "a", "--budget", "kl"), "--budget must be kl=NATS or ce=NATS"),
        (("--plan", "a", "--budget", "mse=1"), "--budget must be kl=NATS or ce=NATS"),
        (("--plan", "a", "--rounds", "5"), "--rounds must be CONTENTS:KEPT,..."),
    ],
)
def test_what_cannot_be_swept(cli: Cli, words: tuple[str, ...], said: str) -> None:
    assert said in cli("sweep", *words, "-q").error(2)


def test_more_latents_than_there_are_is_said(cli: Cli, model: Path, plan: Path, task: Path) -> None:
    words = ("--grid", "k=99", "--grid", "scale=1", "--rounds", "1:1", *SMALL[2:])
    outcome = cli("sweep", "--model", model, "--plan", plan, "--task", task, *words)
    assert outcome.status == 0
    assert "warning: --grid k=99 is more than the 3 latents there are" in outcome.err
