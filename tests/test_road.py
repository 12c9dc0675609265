"""The whole road on the real SmolLM2, and both make commands from a clean copy (slow)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def clean_copy(place: Path) -> Path:
    """What a clone would hold: tracked files and those not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, place / name)
    return place


def run(*command: str, cwd: Path, minutes: float) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60 * minutes
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def test_demo_steers_the_real_model(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = run(
        sys.executable, "-m", "saesteer.cli", "demo", "--quick", "--json", "-o", str(out),
        cwd=tmp_path, minutes=15,
    )  # fmt: skip
    printed = json.loads(done.stdout)
    assert printed == json.loads((out / "demo.json").read_text())
    stages = printed["stages"]
    for layer, final in stages["train"].items():
        if layer != "seconds":
            assert final["fvu"] < 0.35, f"{layer}: {final}"
            assert 1 <= final["l0"] <= 32
    (name,) = (name for name in stages if name.startswith("find "))
    arms = stages[name]["arms"]
    # Nobody turns statements into questions by accident; what steering reaches is printed, not
    # asserted, but it must be clearly more than nothing for the road to be one.
    assert arms["unsteered"]["follows"][0] <= 0.2
    assert arms["steered"]["follows"][0] > arms["unsteered"]["follows"][0]
    for folder in ("activations", "replies", "sae", "plan-question", "plan-question/latents"):
        assert any((out / folder).iterdir()), folder
    assert (out / "demo.html").stat().st_size > 5000

    import torch
    from sae_lens import SAE

    from saesteer.checkpoints import load_sae

    trained = next((out / "sae").glob("layer-16*"))
    theirs, ours = SAE.load_from_disk(str(trained)), load_sae(trained)
    shard = next((out / "activations" / "layer-16").glob("*.safetensors"))
    from safetensors.torch import load_file

    x = load_file(shard)["activations"][:256].float()
    with torch.no_grad():
        f, g = theirs.encode(x), ours.encode(x)
        # float32 sums of 576 products, in another order; values of order 100
        assert float((f - g).abs().max()) < 1e-4 * float(g.abs().max())
        assert float((theirs.decode(f) - ours.decode(g)).abs().max()) < 1e-4 * float(x.abs().max())


def test_both_make_commands_work_from_a_clean_copy(tmp_path: Path) -> None:
    copy = clean_copy(tmp_path / "copy")
    shown = run("make", "demo", "ARGS=--quick --out first", cwd=copy, minutes=40)
    assert "Success and damage" in shown.stdout
    assert (copy / "first" / "demo.json").is_file()
    tested = run("make", "test", "ARGS=tests/test_layers.py", cwd=copy, minutes=40)
    assert "passed" in tested.stdout
