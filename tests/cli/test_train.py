"""`saesteer train` on a tiny model and on shards."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from saesteer.checkpoints.sae_file import load_sae

from .conftest import Cli

SMALL = ("--d-sae", 64, "--k", 4, "--tokens", 1280, "--batch-tokens", 64)


def test_from_shards(cli: Cli, acts: Path, tmp_path: Path) -> None:
    outcome = cli("train", "--activations", acts, "--layer", 1, *SMALL, "-o", tmp_path / "sae")
    assert outcome.status == 0, outcome.err
    assert "train: 1,280 tokens" in outcome.err
    assert "train: done, 1,280 tokens in" in outcome.err
    assert "FVU" in outcome.err
    assert "for a shuffle buffer of 640 tokens" in outcome.err
    header, row, following = outcome.out.splitlines()
    assert header.split() == [
        "layer", "d_sae", "k", "seed", "tokens", "FVU", "held-out", "FVU", "L0", "held-out", "L0",
        "dead", "time", "folder",
    ]  # fmt: skip
    assert row.split()[:5] == ["1", "64", "4", "0", "1,280"]
    assert following.startswith(f"next: saesteer metrics --sae {tmp_path / 'sae'}")
    sae = load_sae(tmp_path / "sae")
    assert (sae.spec.d_sae, sae.spec.k, sae.spec.layer) == (64, 4, 1)


def test_both_l0_of_an_sae_that_infers_by_a_threshold(cli: Cli, acts: Path, tmp_path: Path) -> None:
    words = ("--arch", "batchtopk", "--layer", 1, *SMALL, "--tokens", 6400)
    outcome = cli("train", "--activations", acts, *words, "-o", tmp_path / "sae")
    assert outcome.status == 0, outcome.err
    header, row, _ = outcome.out.splitlines()
    assert header.split()[5:12] == ["FVU", "held-out", "FVU", "L0", "held-out", "L0", "dead"]
    run = json.loads((tmp_path / "sae" / "run.json").read_text())
    final, sae = run["final"], run["sae"]
    assert final["held_out_l0"] == 4.0 and final["held_out_rows"] > 64
    assert sae["l0_heldout"] == pytest.approx(4, rel=0.01)
    assert load_sae(tmp_path / "sae").threshold.tolist() == pytest.approx([sae["threshold"]] * 64)
    assert row.split()[7] == "4" and float(row.split()[8]) == pytest.approx(4, rel=0.01)


def test_an_l0_far_from_its_target_is_told(cli: Cli, acts: Path, tmp_path: Path) -> None:
    """Thresholds start above 0, and so few steps do not lower them."""
    words = ("--arch", "jumprelu", "--l0", 60, "--layer", 1, "--lr", 1e-6, "--d-sae", 64,
             "--tokens", 6400, "--batch-tokens", 64)  # fmt: skip
    outcome = cli("train", "--activations", acts, *words, "-q", "-o", tmp_path / "sae")
    assert outcome.status == 0, outcome.err
    line = outcome.err.splitlines()[-1]
    assert line.startswith("warning:") and "where 60 was aimed at: train on more --tokens" in line
    run = json.loads((tmp_path / "sae" / "run.json").read_text())
    assert run["sae"]["l0_target"] == 60 and run["sae"]["l0_heldout"] < 0.8 * 60
    (told,) = run["warnings"]
    assert (
        "where 60 was aimed at: train on more `tokens`" in told and "warnings" not in run["final"]
    )


def test_every_combination_and_json(cli: Cli, acts: Path, tmp_path: Path) -> None:
    """Without --layer every stored layer is trained on."""
    found = cli("train", "--activations", acts, *SMALL[2:], "--d-sae", "48,64", "--lr", 0.001,
                "-o", tmp_path, "--json", "-q", "--dtype", "float32").json()  # fmt: skip
    names = [Path(run["folder"]).name for run in found["runs"]]
    assert names == [
        f"layer-{layer}_dsae-{d_sae}_k-4_seed-0" for layer in (1, 3) for d_sae in (48, 64)
    ]
    for run in found["runs"]:
        assert run["config"]["lr"] == 0.001
        written = json.loads((Path(run["folder"]) / "run.json").read_text())
        assert written == {key: value for key, value in run.items() if key != "folder"}


def test_live_with_replies(cli: Cli, model: Path, task: Path, tmp_path: Path) -> None:
    words = ("--replies", task, "--context", 32, "--lm-dtype", "float32", "--json", "-q")
    found = cli("train", "-m", model, "--layer", -2, *SMALL, *words, "-o", tmp_path / "sae").json()
    (run,) = found["runs"]
    assert run["sae"]["layer"] == 2
    assert len(run["data"]) == 2  # the corpus and the replies
    assert run["final"]["tokens"] == 1280


# --- what goes wrong -----------------------------------------------------------------------------


def fails(cli: Cli, status: int, tmp_path: Path, *words: object) -> str:
    """The error of a training that ends so, and leaves no folder."""
    line = cli("train", "-q", "-o", tmp_path / "sae", *words).error(status)
    assert not (tmp_path / "sae").exists()
    return line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--model (live training) or --activations (shards): give one of them, got neither"),
        (["--model", "a", "--activations", "b"], "got both"),
        (["--activations", "a", "--dtype", "fp16"], "--dtype must be auto, float32 or bfloat16"),
        (["--activations", "a", "--data", "x.txt"], "--data needs --model"),
        (["--activations", "a", "--replies", "french"], "--replies needs --model"),
        (["--activations", "a", "--lm-dtype", "bf16"], "--lm-dtype needs --model"),
        (["--activations", "a", "--compile"], "--compile needs --model"),
        (["--activations", "a", "--isolate-documents"], "--isolate-documents needs --model"),
        (["--model", "a"], "--layer is missing"),
        (
            ["--model", "a", "--layer", "1", "--arch", "rely"],
            "--arch must be one of topk, abstopk, batchtopk",
        ),
        (
            ["--activations", "a", "--d-sae", "16", "--k", "32"],
            "--d-sae must be at least --k (32), got 16",
        ),
        (
            ["--activations", "a", "--arch", "matryoshka", "--d-sae", "64", "--prefixes", "8,32"],
            "--prefixes must end at --d-sae (64), got 8,32",
        ),
        (
            ["--activations", "a", "--arch", "matryoshka", "--prefixes", "32,8"],
            "--prefixes must rise, got 32,8",
        ),
        (
            ["--activations", "a", "--prefixes", "8,32"],
            "--prefixes is no setting of --arch topk, got 8,32: leave it out",
        ),
        (["--activations", "a", "--l0", "20"], "--l0 is no setting of --arch topk, got 20"),
        (
            ["--activations", "a", "--arch", "jumprelu", "--k", "32"],
            "--k is no setting of --arch jumprelu, got 32: give --l0",
        ),
        (
            ["--activations", "a", "--arch", "gated", "--k", "20"],
            "--k is no setting of --arch gated, got 20: give --l0",
        ),
        (
            ["--activations", "a", "--arch", "standard", "--bandwidth", "1"],
            "--bandwidth is no setting of --arch standard, got 1.0: leave it out",
        ),
        (
            ["--activations", "a", "--arch", "gemma-scope-2", "--prefixes", "8", "--d-sae", "64"],
            "--prefixes must end at --d-sae (64), got 8",
        ),
        (
            ["--activations", "a", "--to-layer", "3"],
            "--to-layer is no setting of --arch topk, got 3: leave it out",
        ),
        (
            ["--activations", "a", "--arch", "transcoder"],
            "--arch transcoder needs --to-layer or --to-site",
        ),
        (["--activations", "a", "--arch", "relu"], "--arch relu is called standard here"),
        (["--activations", "a,b"], "several folders of --activations are for --arch crosscoder"),
        (["--activations", "a", "--recipe", "x"], "--recipe must be one of topk-gao, batchtopk-"),
        (
            ["--activations", "a", "--recipe", "jumprelu-deepmind", "--k", "32"],
            "--k is no setting of --arch jumprelu, got 32: give --l0",
        ),
        (
            ["--activations", "a", "--arch", "jumprelu", "--cuda-graph"],
            "--cuda-graph cannot record a step of --arch jumprelu",
        ),
        (
            ["--activations", "a", "--arch", "jumprelu", "--d-sae", "16"],
            "--l0 must be below --d-sae (16), got 32",
        ),
        (["--activations", "a", "--arch", "jumprelu", "--l0", "0"], "--l0 must be above 0, got 0"),
        (["--activations", "a", "--k", "0"], "--k must be at least 1, got 0"),
        (["--activations", "a", "--lr", "-1"], "--lr must be between 0 and 1, got -1"),
        (["--activations", "a", "--tokens", "100"], "--tokens must be at least twice"),
    ],
)
def test_wrong_usage(cli: Cli, tmp_path: Path, words: list[str], says: str) -> None:
    assert says in fails(cli, 2, tmp_path, *words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--layer", 3, "--to-layer", 1], "--to-layer must not come before --layer (3), got 1"),
        (["--layer", 1, "--to-layer", 1], "name what is read itself (layer 1 resid_post)"),
        (["--layer", 1, "--to-layer", 2], "has no matching layer and site"),
    ],
)
def test_places_that_no_transcoder_can_write(
    cli: Cli, acts: Path, tmp_path: Path, words: list[object], says: str
) -> None:
    outcome = cli("train", "--activations", acts, "--arch", "transcoder", *SMALL, *words,
                  "-q", "-o", tmp_path / "sae")  # fmt: skip
    assert outcome.status in (1, 2) and says in outcome.err
    assert not (tmp_path / "sae").exists()


def test_a_crosscoder_needs_several_places(cli: Cli, acts: Path, tmp_path: Path) -> None:
    line = fails(cli, 2, tmp_path, "--activations", acts, "--arch", "crosscoder", "--layer", 1)
    assert "a crosscoder needs several places, got 1: give several --layer" in line


def test_a_transcoder_and_a_crosscoder(cli: Cli, acts: Path, tmp_path: Path) -> None:
    words = ("train", "--activations", acts, *SMALL)
    found = cli(*words, "--arch", "skip-transcoder", "--layer", 1, "--to-layer", 3,
                "-o", tmp_path / "t")  # fmt: skip
    assert found.status == 0, found.err
    assert found.out.splitlines()[1].split()[:3] == ["1", "to", "3"]
    run = json.loads((tmp_path / "t" / "run.json").read_text())
    assert (run["sae"]["layer"], run["sae"]["to_layer"]) == (1, 3)
    found = cli(*words, "--arch", "crosscoder", "--layer", "1,3", "-o", tmp_path / "c")
    assert found.status == 0, found.err
    assert found.out.splitlines()[1].split()[0] == "1+3"


def test_a_recipe_and_flags_that_contradict_it(cli: Cli, acts: Path, tmp_path: Path) -> None:
    words = ("--recipe", "jumprelu-deepmind", "--layer", 1, "--d-sae", 64, "--l0", 8,
             "--tokens", 1280, "--batch-tokens", 64, "--lr", 0.002)  # fmt: skip
    outcome = cli("train", "--activations", acts, *words, "-o", tmp_path / "sae")
    assert outcome.status == 0, outcome.err
    assert "recipe jumprelu-deepmind: Rajamanoharan et al. 2024" in outcome.err
    assert "--lr 0.002 was given and wins: the recipe jumprelu-deepmind has 7e-05" in outcome.err
    assert "--batch-tokens 64 was given and wins" in outcome.err
    config = json.loads((tmp_path / "sae" / "run.json").read_text())["config"]
    assert (config["arch"], config["lr"], config["beta1"]) == ("jumprelu", 0.002, 0.0)
    assert config["jumprelu"]["bandwidth"] == 0.001 and config["jumprelu"]["units"] == "unit"
    assert config["sparsity_warmup_steps"] == 4, "a fifth of 20 steps"


def test_a_state_of_another_architecture(cli: Cli, acts: Path, tmp_path: Path) -> None:
    words = ("train", "--activations", acts, *SMALL, "--layer", 1, "-q", "-o", tmp_path / "sae")
    assert cli(*words, "--arch", "topk").status == 0
    line = cli(*words, "--arch", "batchtopk", "--resume").error(1)
    assert "was made with --arch topk, now it is batchtopk" in line


def test_k_beyond_the_default_width(cli: Cli, acts: Path, tmp_path: Path) -> None:
    """Eight times d_model is known only once the shards are open."""
    line = fails(cli, 2, tmp_path, "--activations", acts, "--k", 300)
    assert "--d-sae must be at least --k (300), got 256" in line


def test_out_is_needed(cli: Cli, acts: Path) -> None:
    assert "--out is missing" in cli("train", "--activations", acts, "-q").error(2)


def test_shards_that_cannot_be_used(cli: Cli, acts: Path, tmp_path: Path) -> None:
    line = fails(cli, 1, tmp_path, "--activations", tmp_path / "none")
    assert f"--activations {tmp_path / 'none'}" in line
    line = fails(cli, 1, tmp_path, "--activations", acts, "--layer", 2)
    assert "has no matching layer and site" in line and "asked: --layer 2)" in line
    broken = tmp_path / "broken"
    for file in acts.rglob("*"):
        if file.is_file():
            copy = broken / file.relative_to(acts)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes()[: -100 if file.suffix == ".safetensors" else None])
    line = fails(cli, 1, tmp_path, "--activations", broken)
    assert f"--activations {broken}" in line
    assert "damaged or cut short" in line


def test_layer_out_of_range_live(cli: Cli, model: Path, tmp_path: Path) -> None:
    line = fails(cli, 2, tmp_path, "--model", model, "--layer", 9)
    assert "--layer 9 is out of range" in line


def test_a_corpus_that_ends_early_is_an_error(cli: Cli, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The heron stood still. " * 60)
    words = ("--model", model, "--layer", 1, "--data", text, "--context", 32, *SMALL)
    line = cli("train", "-q", "-o", tmp_path / "sae", *words).error(1)
    assert "the corpus ended after" in line
    assert "--epochs" in line
    outcome = cli("train", "-q", "-o", tmp_path / "sae", *words, "--epochs", 9, "--force")
    assert outcome.status == 0, outcome.err


def test_existing_folder(cli: Cli, acts: Path, sae: Path, tmp_path: Path) -> None:
    words = ("train", "--activations", acts, *SMALL, "-q")
    assert f"--out {sae} exists and is not empty" in cli(*words, "-o", sae).error(2)
    assert "holds what --activations reads" in cli(*words, "-o", acts, "--force").error(2)
    assert (acts / "manifest.json").exists()


def test_non_finite_loss_keeps_the_last_good_state(
    cli: Cli, acts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saesteer.sae.training.architectures.topk import TopK

    out = tmp_path / "sae"
    words = ("train", "--activations", acts, "--layer", 1, *SMALL, "-o", out, "-q")
    loss = TopK.loss
    calls = 0

    def broken(*args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        found = loss(*args, **options)
        if calls == 8:
            found.loss = found.loss * torch.nan
        return found

    with monkeypatch.context() as patch:
        patch.setattr(TopK, "loss", broken)
        line = cli(*words).error(1)
    assert "is not finite at step 7" in line
    assert "--lr" in line
    state = json.loads((out / "state" / "latest.json").read_text())
    assert state["meta"]["step"] == 7
    assert not (out / "sae_weights.safetensors").exists()
    outcome = cli(*words, "--resume", "--json")
    assert outcome.json()["runs"][0]["final"]["step"] == 20


def test_resume_before_the_first_state_starts_from_zero(
    cli: Cli, acts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sae"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"step": 3}\n')
    words = ("train", "--activations", acts, "--layer", 1, *SMALL, "-o", out, "-q")
    assert cli(*words, "--resume").status == 0
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 21))


def test_resume_with_other_settings(cli: Cli, acts: Path, sae: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(sae, copy)
    line = cli("train", "--activations", acts, "--layer", 1, *SMALL, "-o", copy, "--resume",
               "-q").error(1)  # fmt: skip
    assert "--resume" in line
    assert "6400, now it is 1280" in line


def test_ctrl_c_saves_the_state_and_resume_finishes(cli: Cli, acts: Path, tmp_path: Path) -> None:
    out = tmp_path / "sae"
    words = ("train", "--activations", acts, "--layer", 1, "--d-sae", 64, "--k", 4,
             "--tokens", 64 * 400, "--batch-tokens", 64, "-o", out)  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "saesteer.cli", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = out / "metrics.jsonl"
    give_up = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().endswith("\n")):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    stdout, stderr = child.communicate(timeout=120)
    assert (child.returncode, stdout) == (130, ""), stderr
    lines = stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors == lines[-1:]
    assert "stopped at step" in errors[0] and "--resume" in errors[0]
    assert "Traceback" not in stderr
    state = json.loads((out / "state" / "latest.json").read_text())
    assert 0 < state["meta"]["step"] < 400
    assert not (out / "cfg.json").exists()
    assert cli(*words, "--resume", "-q").status == 0
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(4, 401, 4))
    assert load_sae(out).spec.d_sae == 64
