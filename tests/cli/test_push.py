"""`saesteer push` to a folder."""

from pathlib import Path

from saesteer.checkpoints import from_pretrained
from saesteer.checkpoints.files import read_json

from .conftest import Cli


def test_push_and_open(cli: Cli, sae: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    done = cli("push", "--sae", sae, "--repo", shared, "--id", "first", "-q",
               "-o", tmp_path / "note", "--json").json()  # fmt: skip
    assert from_pretrained(shared, "first").sha256 == done["saes"]["first"]
    assert read_json(tmp_path / "note" / "run.json")["pushed"] == done
    outcome = cli("push", "--sae", sae, "--repo", shared, "-q")
    assert outcome.status == 0
    assert outcome.out.startswith(f"{shared} holds\n  blocks.1.hook_resid_post  SHA-256 ")
    assert "from_pretrained(" in outcome.out


def test_what_cannot_be(cli: Cli, sae: Path, tmp_path: Path) -> None:
    assert "--sae is missing" in cli("push", "--repo", "./x").error(2)
    assert "--repo is missing" in cli("push", "--sae", sae).error(2)
    assert "holds no cfg.json" in cli("push", "--sae", tmp_path, "--repo", "./x", "-q").error(1)
    line = cli("push", "--sae", sae, "--repo", "org/saes", "-q").error(1)
    assert "the Hub cannot be reached" in line
