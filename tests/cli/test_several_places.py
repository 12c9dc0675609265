"""Transcoders and crosscoders through every verb, on a tiny model."""

import json
from pathlib import Path

import pytest
import torch

from saesteer.checkpoints.sae_file import load_sae

from .conftest import Cli

SMALL = ("--d-sae", 64, "--k", 4, "--tokens", 1280, "--batch-tokens", 64, "--context", 32,
         "--lm-dtype", "float32", "--lr", 0.005, "-q")  # fmt: skip


@pytest.fixture(scope="module")
def transcoder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .conftest import run_once

    folder = tmp_path_factory.mktemp("places") / "transcoder"
    run_once("train", "-m", model, "--arch", "skip-transcoder", "--layer", 1, "--site",
             "resid_mid", "--to-site", "mlp_out", *SMALL, "-o", folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def crosscoder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .conftest import run_once

    folder = tmp_path_factory.mktemp("places") / "crosscoder"
    run_once("train", "-m", model, "--arch", "crosscoder", "--layer", "1,2", *SMALL, "-o", folder)
    return folder


def test_what_was_trained(transcoder: Path, crosscoder: Path) -> None:
    sae = load_sae(transcoder)
    assert (sae.spec.layer, sae.spec.site) == (1, "resid_mid") and sae.W_skip is not None
    assert sae.spec.metadata["hook_name_out"] == "blocks.1.hook_mlp_out"
    run = json.loads((transcoder / "run.json").read_text())
    assert (run["sae"]["to_layer"], run["sae"]["to_site"]) == (1, "mlp_out")
    sae = load_sae(crosscoder)
    assert [part["layer"] for part in sae.spec.metadata["saesteer"]["crosscoder"]] == [1, 2]


def test_metrics(cli: Cli, model: Path, transcoder: Path, crosscoder: Path) -> None:
    for sae, writes in (
        (transcoder, [[1, "mlp_out"]]),
        (crosscoder, [[1, "resid_post"], [2, "resid_post"]]),
    ):
        found = cli("metrics", "--sae", sae, "-m", model, "--tokens", 400, "--dtype", "float32",
                    "--context", 32, "-q", "--json").json()  # fmt: skip
        assert found["writes"] == writes and found["decoder_projection"] is None
        run = json.loads((sae / "run.json").read_text())
        # Other text, and another mean: about the same.
        assert found["fvu"]["value"] == pytest.approx(run["final"]["fvu"], abs=0.25)
        assert found["l0"]["value"] == pytest.approx(4, rel=0.6)
        assert found["kl"]["value"] > 0


def test_rank_and_steer(
    cli: Cli, model: Path, task: Path, transcoder: Path, crosscoder: Path, tmp_path: Path
) -> None:
    """Read where it reads; the plan steers where it writes."""
    for sae, words, place, columns in (
        (transcoder, (), (1, "mlp_out"), slice(None)),
        (crosscoder, ("--layer", 2), (2, "resid_post"), slice(32, None)),
    ):
        plan = tmp_path / sae.name
        outcome = cli("rank", "--sae", sae, "-m", model, "--task", task, "--top", 3, *words,
                      "--by", "meandiff", "-q", "-o", plan)  # fmt: skip
        assert outcome.status == 0, outcome.err
        from saesteer.steering import load_plan

        made = load_plan(plan / "plan.yaml")
        assert (made.part.layer, made.part.site) == place
        ids = [latent.id for latent in made.part.latents]
        torch.testing.assert_close(made.part.directions, load_sae(sae).W_dec[ids][:, columns])
        steered = cli("steer", "--plan", plan / "plan.yaml", "-m", model, "-p", "A heron", "-q",
                      "--max-new-tokens", 4, "--json").json()  # fmt: skip
        assert steered["tokens_touched"] > 0
        by_number = cli("steer", "--sae", sae, "-m", model, "--latents", f"{ids[0]}:2", *words,
                        "-p", "A heron", "-q", "--max-new-tokens", 4, "--json").json()  # fmt: skip
        assert by_number["tokens_touched"] > 0
        line = cli("steer", "--sae", sae, "-m", model, "--latents", f"{ids[0]}:2", *words,
                   "--method", "set", "-p", "A heron", "-q").error(2)  # fmt: skip
        assert "--method set depends on the values of latents" in line
    line = cli("steer", "--sae", crosscoder, "-m", model, "--latents", "1:2", "-p", "A",
               "-q").error(2)  # fmt: skip
    assert "writes layer 1 resid_post, layer 2 resid_post; asked: none of them" in line


def test_push(cli: Cli, transcoder: Path, tmp_path: Path) -> None:
    outcome = cli("push", "--sae", transcoder, "--repo", tmp_path / "repo", "-q")
    assert outcome.status == 0, outcome.err
    card = (tmp_path / "repo" / "README.md").read_text().replace("\\", "")
    assert "jumprelu_skip_transcoder" in card and "blocks.1.hook_mlp_out" in card
