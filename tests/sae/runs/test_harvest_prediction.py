"""What is predicted comes true: bytes exactly, the rest as far as a machine is steady."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import UsageError
from saesteer.checkpoints.shards import ShardReader
from saesteer.sae.config import HarvestConfig, TextConfig
from saesteer.sae.model.forward_pass import ForwardPass
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.runs import harvest_prediction as prediction
from saesteer.sae.runs.harvest_prediction import predict_harvest
from saesteer.sae.runs.memory_use import held_bytes
from saesteer.sae.verbs.harvest import harvest

Shared = Callable[..., LanguageModel]

CONFIG = HarvestConfig(
    layers=(1, 2), tokens=2000, text=TextConfig(context=32, batch_size=4), shard_tokens=500
)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "_TIMED_SECONDS", 0.0)


@pytest.mark.parametrize("keep_positions", [False, True])
def test_disk(keep_positions: bool, shared_lm: Shared, tmp_path: Path) -> None:
    lm = shared_lm()
    config = replace(CONFIG, keep_positions=keep_positions)
    found = predict_harvest(lm, config)
    harvest(lm, tmp_path / "acts", config)
    paths = list((tmp_path / "acts").rglob("*.safetensors"))
    size = sum(path.stat().st_size for path in paths)
    # A header for each file is all that is not counted.
    assert 0 <= size - found["bytes"] < 400 * len(paths)
    assert ShardReader(tmp_path / "acts").tokens == found["tokens"]
    assert found["seconds"] == pytest.approx(2000 / found["tokens_per_second"])


def test_memory_counts_shards_on_their_way(shared_lm: Shared) -> None:
    lm = shared_lm()
    now = held_bytes()
    small = predict_harvest(lm, CONFIG)["memory_bytes"]
    row = 2 * (32 * 4 + 4)
    large = replace(CONFIG, tokens=10**9, shard_tokens=10**8)
    found = predict_harvest(lm, large)["memory_bytes"]
    assert small >= now * 0.5 and found > 2 * 10**8 * row
    assert predict_harvest(lm, replace(large, shuffle=True))["memory_bytes"] > found


def test_an_automatic_batch_size_is_named(shared_lm: Shared) -> None:
    text = replace(CONFIG.text, batch_size=0)
    found = predict_harvest(shared_lm(), replace(CONFIG, text=text))
    assert 1 <= found["batch_size"] <= 16_384 // 32


def test_a_corpus_too_short_to_time(shared_lm: Shared, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("some words " * 60)
    text = replace(CONFIG.text, data=(str(path),), batch_size=64)
    with pytest.raises(UsageError, match="`dry_run` needs two batches"):
        predict_harvest(shared_lm(), replace(CONFIG, text=text))


def test_what_is_compiled_is_timed_compiled(
    fresh_lm: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    lm, passes = fresh_lm(), []
    begin = ForwardPass.begin

    def spied(*arguments: Any) -> ForwardPass:
        passes.append("forward" in vars(lm.blocks[0]))
        return begin(*arguments)

    monkeypatch.setattr(ForwardPass, "begin", spied)
    for compiled in (False, True):
        passes.clear()
        text = replace(CONFIG.text, compile=compiled)
        assert predict_harvest(lm, replace(CONFIG, text=text))["compile"] is compiled
        assert len(passes) >= 2 and set(passes) == {compiled}
