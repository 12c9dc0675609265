"""`saesteer convert`, and the other verbs on SAEs of other formats."""

import json
from pathlib import Path

import pytest
import torch

from saesteer.checkpoints.sae_file import load_sae

from .conftest import Cli

pytestmark = pytest.mark.usefixtures("short_dry_run")


def test_an_sae(cli: Cli, sae: Path, acts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("convert", "--from", sae, "--to", out, "--format", "dictionary_learning")
    found = cli(*words, "--activations", acts, "--json", "-q").json()
    assert found["format_to"] == "dictionary_learning" and found["real"]["flips"] == 0
    assert found["real"]["latents_relative"] < 1e-5
    assert {path.name for path in out.iterdir()} == {"ae.pt", "config.json", "run.json"}
    assert json.loads((out / "run.json").read_text())["report"] == found
    assert "not empty" in cli(*words, "-q").error(2)
    table = cli(*words, "--force", "-q")
    assert table.status == 0 and "latents_relative" in table.out and "note: " in table.out
    back = cli("convert", "--from", out, "--to", tmp_path / "back", "--canonical", "-q")
    assert back.status == 0 and "sae_lens" in back.out, back.err
    x = torch.randn(8, 32)
    again = load_sae(tmp_path / "back")
    assert torch.allclose(again.encode(x), load_sae(sae).encode(x), atol=1e-4)


def test_a_report_alone(cli: Cli, sae: Path, tmp_path: Path) -> None:
    outcome = cli("convert", "--from", sae, "--format", "sparsify", "-q")
    assert outcome.status == 0 and "written to" not in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_refusals(cli: Cli, sae: Path, tmp_path: Path) -> None:
    assert "--from is missing" in cli("convert", "-q").error(2)
    assert "--format" in cli("convert", "--from", sae, "--format", "pickle", "-q").error(2)
    assert "does not exist" in cli("convert", "--from", tmp_path / "no", "-q").error(1)
    line = cli("convert", "--from", sae, "--to", sae, "--force", "-q").error(2)
    assert "holds what --from reads" in line
    out = tmp_path / "out"
    line = cli("convert", "--from", sae, "--to", out, "--dtype", "int8", "-q").error(2)
    assert "--dtype" in line and not out.exists()


def test_a_plan_there_and_back(cli: Cli, plan: Path, model: Path, tmp_path: Path) -> None:
    vectors = tmp_path / "vectors"
    words = ("convert", "--from", plan, "--to", vectors, "--format", "gguf", "-q")
    assert "--as-scope all" in cli(*words).error(2) and not vectors.exists()
    outcome = cli(*words, "--as-scope", "all")
    assert "scope generation is lost" in outcome.out, outcome.err
    back = tmp_path / "back"
    words = ("convert", "--from", vectors, "--to", back, "--format", "plan", "-q")
    assert "--model is missing" in cli(*words).error(2)
    assert cli(*words, "--model", model).status == 0
    text = cli("steer", "--plan", back, "--model", model, "-p", "A heron", "--max-new-tokens", 2,
               "--dtype", "float32", "-q")  # fmt: skip
    assert text.status == 0, text.err


@pytest.mark.parametrize("format", ["sparsify", "dictionary_learning"])
def test_metrics_rank_and_doctor_on_other_formats(
    cli: Cli, sae: Path, model: Path, tmp_path: Path, format: str
) -> None:
    out = tmp_path / "layers.1"
    assert cli("convert", "--from", sae, "--to", out, "--format", format, "-q").status == 0
    where = ("--sae", out, "--model", model, "--dtype", "float32", "-q")
    text = ("--context", 32, "--batch-size", 4)
    found = cli("metrics", *where, *text, "--tokens", 200, "--bootstrap", 5, "--json").json()
    assert found["layer"] == 1 and 0 < found["l0"]["value"] <= 4
    assert cli("doctor", *where, *text, "--tokens", 1000).status == 0
    words = ("--latents", "3:1.5", "-p", "A heron", "--max-new-tokens", 2)
    assert cli("steer", *where, *words).status == 0
