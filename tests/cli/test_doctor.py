"""`saesteer doctor` on a tiny model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from saesteer.sae.verbs import doctor as diagnosis

from .conftest import Cli

pytestmark = pytest.mark.usefixtures("short_dry_run")

SMALL = ("--tokens", 2000, "--context", 32, "--batch-size", 4, "--dtype", "float32", "-q")


def test_checklist_and_predictions(cli: Cli, model: Path) -> None:
    outcome = cli("doctor", "--model", model, *SMALL)
    assert outcome.status == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].startswith(f"{model}: layer 2, resid_post")
    checks = [line for line in lines if line.startswith("  ok   ")]
    assert len(checks) >= 5
    assert "for 2,000 tokens" in lines
    # 32 numbers of four bytes and an int32 id for each token
    assert "  shard bytes: 264.0 kB" in lines


def test_json_with_an_sae(cli: Cli, model: Path, sae: Path, tmp_path: Path) -> None:
    out = tmp_path / "findings"
    found = cli("doctor", "--model", model, "--sae", sae, *SMALL, "-o", out, "--json").json()
    assert found["layer"] == 1
    assert all(check["ok"] for check in found["checks"])
    assert json.loads((out / "doctor.json").read_text()) == found


def test_a_failed_check_is_a_failure(
    cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> str:
        """A null edit changes no logit."""
        raise diagnosis._Failed("logits moved")

    monkeypatch.setattr(diagnosis, "_CHECKS", (broken,))
    outcome = cli("doctor", "--model", model, *SMALL)
    assert outcome.status == 1
    assert "  FAIL A null edit changes no logit: logits moved" in outcome.out.splitlines()
    assert outcome.err == (
        "error: 1 of 1 checks failed, first: A null edit changes no logit: logits moved\n"
    )


def test_an_sae_of_other_weights(cli: Cli, sae: Path, tiny_model_dir: Callable[..., Path]) -> None:
    words = ("doctor", "--sae", sae, "--model", tiny_model_dir("llama", seed=1), *SMALL)
    line = cli(*words).error(1)
    assert "was trained on" in line and "--force" in line
    found = cli(*words, "--force", "--json")
    checks = {check["name"]: check for check in json.loads(found.out)["checks"]}
    # It was tried; whether it explains another model's activations is not the point here.
    assert checks["The SAE reconstructs this site"]["detail"].startswith("FVU ")


def test_wrong_usage(cli: Cli, model: Path) -> None:
    line = cli("doctor", "--model", model, *SMALL, "--layer", 7).error(2)
    assert "--layer 7 is out of range" in line
    assert "--device must be" in cli("doctor", "--device", "abacus", "-q").error(2)
