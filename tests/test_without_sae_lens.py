"""A sae_lens that cannot be imported stands in the way of its own releases and of nothing else."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BROKEN = "raise ImportError(\"cannot import name 'Hooked' from 'transformer_lens'\\n(unknown)\")\n"

USE = """
import contextlib, io, json, sys
from pathlib import Path

import torch

from saesteer import checkpoints
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import SAESpec, load_sae, save_sae
from saesteer.checkpoints.shard_writer import ShardWriter
from saesteer.cli.__main__ import VERBS, main
from saesteer.sae import TrainConfig, train

found = {}
try:
    import sae_lens
except ImportError:
    found["broken"] = True

place = Path(sys.argv[1])
helps = {}
for verb in VERBS:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        helps[verb] = [main([verb, "--help"]), len(said.getvalue())]
found["helps"] = helps

writer = ShardWriter(
    place / "acts", layers=[1], sites=["resid_post"], d_model=16, dtype=torch.float32,
    facts={"model": {"name": "made-up", "hash": "0"}},
)
writer.add({(1, "resid_post"): torch.randn(512, 16)}, torch.arange(512))
writer.close()
config = TrainConfig(
    layers=(1,), d_sae=(32,), k=(4,), tokens=1024, batch_tokens=32, buffer_tokens=256,
    warmup_steps=3,
)
train(place / "trained", config, activations=place / "acts", device="cpu")
trained = load_sae(place / "trained")
save_sae(place / "again", trained.spec, **trained.tensors())
found["equal"] = torch.equal(load_sae(place / "again").W_dec, trained.W_dec)
report = checkpoints.convert(place / "trained", place / "converted")
found["notes"], found["compared"] = report["notes"], "sae_lens" in report
found["converted"] = torch.equal(load_sae(place / "converted").W_dec, trained.W_dec)
checkpoints.push(place / "trained", str(place / "shared"))
found["shared"] = checkpoints.from_pretrained(place / "shared").sha256 == trained.sha256
try:
    load_sae("gpt2-small-res-jb:blocks.8.hook_resid_pre")
except UserError as error:
    found["release"] = str(error)
print(json.dumps(found))
"""


def test_one_module_imports_it() -> None:
    root = Path(__file__).parent.parent
    rooms = ("checkpoints", "sae", "steering", "mechanisms", "cli")
    paths = [path for room in rooms for path in (root / room).rglob("*.py")]
    names = [
        path.relative_to(root).as_posix()
        for path in paths
        if re.search(r"^\s*(import|from) sae_lens\b", path.read_text(encoding="utf-8"), re.M)
    ]
    assert len(paths) > 100 and names == ["checkpoints/saelens_releases.py"]


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    (tmp_path / "path" / "sae_lens").mkdir(parents=True)
    (tmp_path / "path" / "sae_lens" / "__init__.py").write_text(BROKEN)
    return tmp_path / "path"


def test_only_releases_need_sae_lens(stub: Path, tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, [str(stub), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-P", "-c", USE, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["broken"], "or this test shows nothing"
    assert len(found["helps"]) > 10
    assert all(status == 0 and length > 200 for status, length in found["helps"].values())
    assert found["equal"] and found["converted"] and found["shared"]
    cause = "sae_lens cannot be imported (cannot import name 'Hooked' from 'transformer_lens' "
    assert not found["compared"] and any(cause in note for note in found["notes"])
    release = "`sae` gpt2-small-res-jb:blocks.8.hook_resid_pre: "
    assert found["release"].startswith(release + cause) and "\n" not in found["release"]
