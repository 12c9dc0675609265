"""A recorded run gives its bits again, and what does not is named."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.files import plain, read_json, read_tensors, write_json, write_tensors
from saesteer.checkpoints.shard_writer import ShardWriter
from saesteer.sae.config import TextConfig, TrainConfig
from saesteer.sae.model.language_model import load_model
from saesteer.sae.verbs.reproduce import reproduce, train_config
from saesteer.sae.verbs.train import train

CONFIG = TrainConfig(
    d_sae=(32,), k=(4,), tokens=1024, batch_tokens=32, buffer_tokens=256, warmup_steps=3
)


def write_shards(folder: Path, seed: int = 0) -> Path:
    writer = ShardWriter(
        folder, layers=[1, 2], sites=["resid_post"], d_model=16, dtype=torch.float32,
        facts={"model": {"name": "made-up", "hash": "0"}},
    )  # fmt: skip
    rows = torch.randn(512, 16, generator=torch.Generator().manual_seed(seed))
    places = [(1, "resid_post"), (2, "resid_post")]
    writer.add(dict.fromkeys(places, rows), torch.arange(512))
    writer.close()
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "acts")


@pytest.fixture
def run(shards: Path, tmp_path: Path) -> Path:
    train(tmp_path / "sae", replace(CONFIG, layers=(1,)), activations=shards, device="cpu")
    return tmp_path / "sae"


def test_the_same_bits_again(run: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    found = reproduce(run)
    assert found["equal"] and found["differences"] == [] and found["again"] is None
    (sae,) = found["saes"]
    assert sae["weights_equal"] and sae["metrics_equal"] and sae["first_differing_step"] is None
    assert set(sae["max_abs_difference"].values()) == {0.0}
    assert sae["final"]["fvu"][0] == sae["final"]["fvu"][1] > 0
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}, "only read"
    kept = reproduce(run, tmp_path / "again")
    assert kept["equal"] and (tmp_path / "again" / "cfg.json").exists()
    with pytest.raises(UsageError, match="not empty"):
        reproduce(run, tmp_path / "again")


def test_a_run_of_several(shards: Path, tmp_path: Path) -> None:
    train(tmp_path / "saes", replace(CONFIG, k=(2, 4)), activations=shards, device="cpu")
    found = reproduce(tmp_path / "saes")
    assert found["equal"] and len(found["saes"]) == 4
    one = tmp_path / "saes" / "layer-2_dsae-32_k-4_seed-0"
    (sae,) = reproduce(one)["saes"]
    assert sae["folder"] == str(one) and sae["weights_equal"]


def test_a_live_run_with_replies(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    config = replace(CONFIG, layers=(1,), text=TextConfig(context=32, batch_size=2, epochs=9))
    lm = load_model(str(tiny_model_dir("llama")), device="cpu")
    train(tmp_path / "sae", config, model=lm, replies=["Say one.", "Say two."], device="cpu")
    found = reproduce(tmp_path / "sae")
    assert found["equal"] and found["differences"] == []
    other = reproduce(tmp_path / "sae", model=str(tiny_model_dir("llama", seed=1)))
    assert not other["equal"]
    assert "model.hash" in [difference["what"] for difference in other["differences"]]
    with pytest.raises(UsageError, match="`activations`: this run was trained live"):
        reproduce(tmp_path / "sae", activations=tmp_path)


def test_what_differs_is_said(run: Path, tmp_path: Path) -> None:
    tensors = read_tensors(run / "sae_weights.safetensors")
    tensors["b_dec"] = tensors["b_dec"].clone()
    tensors["b_dec"][3] += 0.5
    write_tensors(run / "sae_weights.safetensors", tensors)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[6] = lines[6].replace('"l0": ', '"l0": 9')
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    record = read_json(run / "run.json")
    record["versions"]["torch"] = "1.0"
    write_json(run / "run.json", record)
    found = reproduce(run)
    (sae,) = found["saes"]
    assert not found["equal"] and not sae["weights_equal"] and not sae["metrics_equal"]
    # Rounding of b_dec + 0.5 in float32.
    assert sae["max_abs_difference"]["b_dec"] == pytest.approx(0.5, abs=1e-6)
    assert sae["max_abs_difference"]["W_enc"] == 0.0 and sae["first_differing_step"] == 7
    assert [d["what"] for d in found["differences"]] == ["versions.torch"]


def test_shards_that_moved_and_shards_that_changed(run: Path, shards: Path, tmp_path: Path) -> None:
    shards.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="does not exist: give a folder made by harvest"):
        reproduce(run)
    found = reproduce(run, activations=tmp_path / "moved")
    assert found["equal"]
    changed = reproduce(run, activations=write_shards(tmp_path / "other", seed=1))
    assert not changed["equal"]
    assert "data.shards" in [difference["what"] for difference in changed["differences"]]
    with pytest.raises(UsageError, match="`model`: this run was trained from shards"):
        reproduce(run, model="x")


def test_threads_are_those_of_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = read_json(run / "run.json")
    record["machine"]["threads"] = 3
    write_json(run / "run.json", record)
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    reproduce(run)
    assert asked == [3, torch.get_num_threads()]


def test_what_cannot_be_repeated(run: Path, tmp_path: Path) -> None:
    record = read_json(run / "run.json")
    cases: list[tuple[Any, str]] = [
        ({**record, "verb": "rank"}, "run of 'rank'"),
        ({**record, "complete": False}, "was not finished"),
        ({**record, "recipe": None}, "names no recipe"),
        (
            {**record, "config": {**record["config"], "zap": 1}},
            "saesteer that wrote it.*: unknown key 'zap'",
        ),
        (
            {**record, "config": {**record["config"], "k": "x"}},
            "restore run.json.*'k' must be a list",
        ),
        ({**record, "config": {**record["config"], "text": 3}}, "key 'text' must be a mapping"),
        ([], "only those of train and harvest"),
    ]
    for content, message in cases:
        write_json(run / "run.json", content)
        with pytest.raises(UserError, match=message) as error:
            reproduce(run)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="holds no run.json|names no recipe"):
        reproduce(tmp_path / "acts")


def test_a_config_survives_its_record() -> None:
    for config in (CONFIG, TrainConfig(layers=(1, -1), text=TextConfig(data=("a", "b")))):
        recorded = plain(config)
        assert train_config(recorded, "run") == config


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", 60)), deadline=None)
@given(key=st.sampled_from(sorted(plain(CONFIG))), value=junk)
def test_a_config_of_junk_gives_a_typed_error_or_a_config(key: str, value: Any) -> None:
    recorded = {**plain(CONFIG), key: value}
    try:
        assert isinstance(train_config(recorded, "run"), TrainConfig)
    except UserError as error:
        assert len(str(error)) < 500
