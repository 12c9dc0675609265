"""`saesteer attribute`: one model, two models and errors."""

from pathlib import Path

from .conftest import Cli

QUICK = ("--max-new-tokens", 5, "--n", 2, "-q")


def test_replies_are_attributed(cli: Cli, model: Path, tmp_path: Path) -> None:
    words = ("attribute", "--model", model, "--task", "french", *QUICK)
    done = cli(*words, "-o", tmp_path / "out")
    assert done.status == 0, done.err
    assert "random span" in done.out and "2 prompts" in done.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.json", "report.html", "effects.safetensors", "run.json"
    }  # fmt: skip
    found = cli(*words, "--tuned", model, "--response", "same", "--json").json()
    assert found["comparison"]["difference"] == 0 and found["comparison"]["n"] == 2


def test_errors(cli: Cli, model: Path) -> None:
    assert "either --task NAME or --prompts FILE" in cli("attribute", "-q").error(2)
    words = ("attribute", "--model", model, "--task", "french", "-q")
    assert "--method must be one of grad, ig, frozen" in cli(*words, "--method", "lrp").error(2)
    assert "--cut must be in 0..9" in cli(*words, "--cut", 10).error(2)
    assert "--max-new-tokens must be at least 5" in cli(*words, "--max-new-tokens", 4).error(2)
