"""A training state opens as the SAE that the run would have written at that step."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints import conversion, run_state
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import load_sae
from saesteer.checkpoints.shard_writer import ShardWriter
from saesteer.sae.config import TrainConfig
from saesteer.sae.verbs.train import train

D_MODEL = 16
CONFIG = TrainConfig(
    d_sae=(48,), k=(4,), tokens=1024, batch_tokens=64, buffer_tokens=256, checkpoint_every=256,
    keep_states=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    writer = ShardWriter(
        folder, layers=[1], sites=["resid_post"], d_model=D_MODEL, dtype=torch.float32,
        shard_tokens=600,
        facts={
            "model": {"name": "made-up", "hash": "0123456789abcdef", "n_layers": 8},
            "hf_hook_names": ["model.layers.1"], "config": {"context": 77}, "prepend_bos": True,
        },
    )  # fmt: skip
    rows = 9 + 20 * torch.randn(2048, D_MODEL, generator=torch.Generator().manual_seed(0))
    for part in rows.split(256):
        writer.add({(1, "resid_post"): part}, torch.arange(256))
    writer.close()
    return folder


def same(one: Any, two: Any) -> bool:
    mine, theirs = one.tensors(), two.tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


def test_the_last_state_is_the_sae_that_was_written(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(out, CONFIG, activations=shards, device="cpu")
    final, state = load_sae(out), load_sae(out / "state")
    assert final.format == "saelens" and state.format == "saesteer-state"
    assert same(final, state), "to the bit, scale and mean folded"
    x = 9 + 20 * torch.randn(64, D_MODEL, generator=torch.Generator().manual_seed(5))
    assert torch.equal(final.encode(x), state.encode(x)) and bool((state.encode(x) > 0).any())
    for name in ("hook_name", "hf_hook_name", "model_name", "k", "architecture"):
        assert getattr(state.spec, name) == getattr(final.spec, name)
    assert state.spec.metadata["saesteer"] == final.spec.metadata["saesteer"]
    assert state.spec.metadata["saesteer"]["tokens"] == CONFIG.tokens


def test_every_state_kept_is_the_sae_of_its_step(shards: Path, tmp_path: Path) -> None:
    """A run stopped at a step, whose SAE the trainer itself writes then, against its state."""
    out = tmp_path / "run"
    saved: dict[int, Any] = {}

    def progress(stage: str, done: int, total: int, note: str) -> None:
        if stage == "train" and done == 512:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(out, CONFIG, activations=shards, device="cpu", progress=progress)
    for path in sorted((out / "state").glob("state-*.safetensors")):
        sae = load_sae(path)
        saved[sae.spec.metadata["saesteer"]["tokens"]] = sae
        with pytest.raises(UserError, match="not among the states"):
            load_sae(path.with_name("state-00000099.safetensors"))
    assert saved, "at least the first state is there"
    # A run without weights means its newest state, and convert reads it as any other SAE.
    assert same(load_sae(out), saved[max(saved)])
    report = conversion.convert(out, tmp_path / "sae")
    assert report["format_from"] == "saesteer-state"
    assert same(load_sae(tmp_path / "sae"), saved[max(saved)])
    train(out, CONFIG, activations=shards, device="cpu", resume=True)
    assert not same(load_sae(out), saved[max(saved)]), "training went on from there"


def test_one_of_several(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    runs = train(out, replace(CONFIG, init_seed=(0, 1)), activations=shards, device="cpu")
    names = [Path(run["folder"]).name for run in runs]
    with pytest.raises(UserError, match=rf"holds the SAEs {names[0]}, {names[1]}: give one"):
        load_sae(out / "state")
    for name in names:
        assert same(load_sae(out / "state" / name), load_sae(out / name))
        newest = run_state.find_state(out / "state")[0]
        assert same(load_sae(newest / name), load_sae(out / name))
        # Before the SAEs are written, a folder of one of them means its state.
        final = load_sae(out / name)
        for file in ("sae_weights.safetensors", "cfg.json"):
            (out / name / file).unlink()
        assert same(load_sae(out / name), final)
    with pytest.raises(UserError, match="holds the SAEs"):
        load_sae(out / "state" / "layer-9")


def test_states_that_are_refused(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(out, CONFIG, activations=shards, device="cpu")
    tensors, meta = run_state.load_state(out)
    (name,) = meta["saes"]
    for changes, error in (
        ({"saes": None}, "does not say what its SAEs are"),
        ({"scales": [0.0]}, "input scale is 0.0"),
        ({"saes": {name: {**meta["saes"][name], "d_sae": 47}}}, "does not fit its spec"),
        (
            {"saes": {name: {**meta["saes"][name], "metadata": 3}}},
            "key 'metadata' must be a mapping",
        ),
        ({"saes": {name: {**meta["saes"][name], "surprise": 3}}}, "'surprise'"),
    ):
        run_state.save_state(out, tensors, {**meta, **changes})
        with pytest.raises(UserError, match=error):
            load_sae(out / "state")
    short = {key: value for key, value in tensors.items() if key != "0/param.b_dec"}
    run_state.save_state(out, short, meta)
    with pytest.raises(UserError, match="missing: param.b_dec"):
        load_sae(out / "state")
    bad = {**tensors, "0/param.b_dec": tensors["0/param.b_dec"] * torch.nan}
    run_state.save_state(out, bad, meta)
    with pytest.raises(UserError, match="NaN"):
        load_sae(out / "state")
    pointer = out / "state" / "latest.json"
    pointer.write_text(json.dumps({**json.loads(pointer.read_text()), "meta": {}}))
    with pytest.raises(UserError, match="checksum"):
        load_sae(out / "state")
