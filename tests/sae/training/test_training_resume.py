"""Training stops without loss and goes on to the bit, after Ctrl-C, a kill or a loss gone wrong."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import Interrupted, NonFiniteError, UserError
from saesteer.checkpoints.run_state import has_state, load_state
from saesteer.checkpoints.state_saver import StateSaver
from saesteer.sae.config import TextConfig, TrainConfig
from saesteer.sae.training import sae_trainer as trainer_module
from saesteer.sae.training.architectures.topk import TopK
from saesteer.sae.verbs.train import train

from ..training_runs import (
    CONFIG,
    LIVE,
    Shared,
    all_metrics,
    dies_at,
    metrics_of,
    weights,
    write_shards,
)


def test_a_loss_that_is_not_finite_stops_before_anything_moves(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, init_seed=(0, 1), layers=(1,))
    train(tmp_path / "whole", config, activations=shards, device="cpu")
    original = TopK.loss
    calls = 0

    def poisoned(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        loss = original(*args, **options)
        if calls == 2 * 11 + 2:  # the second SAE, at the twelfth step
            loss.loss = loss.loss * torch.nan
        return loss

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(TopK, "loss", poisoned)
        with pytest.raises(
            NonFiniteError,
            match="the loss of layer-1_dsae-48_k-4_seed-1 .* at step 11: the last state",
        ):
            train(out, config, activations=shards, device="cpu")
    tensors, meta = load_state(out)
    assert meta["step"] == 11 and all(torch.isfinite(t).all() for t in tensors.values() if
                                      t.is_floating_point())  # fmt: skip
    assert not weights(out), "no SAE is written"
    # Both SAEs stand where eleven steps left them, and the batch is not lost: the rest is equal.
    train(out, config, activations=shards, device="cpu", resume=True)
    assert weights(out) == weights(tmp_path / "whole")
    assert all_metrics(out) == all_metrics(tmp_path / "whole")


def test_a_step_that_a_gpu_left_out_is_never_saved(shards: Path, tmp_path: Path) -> None:
    """On a GPU a bad loss shows at the next log line; until then no state may be written."""
    config = replace(CONFIG, layers=(1,), tokens=64 * 200, checkpoint_every=64 * 25)
    train(tmp_path / "whole", config, activations=shards, device="cpu")
    out = tmp_path / "out"
    made: list[Any] = []
    original = trainer_module.SAETrainer.__init__

    def remember(self: Any, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        made.append(self)

    def fails(stage: str, done: int, total: int, note: str) -> None:
        # Between two log lines (every other step), just before a periodic save.
        if stage == "train" and done == 64 * 75:
            made[0].optimiser.failed.fill_(True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module.SAETrainer, "__init__", remember)
        patch.setattr(StateSaver, "ready", lambda self: True)
        with pytest.raises(NonFiniteError, match="the last state before it was kept"):
            train(out, config, activations=shards, device="cpu", progress=fails)
    assert load_state(out)[1]["step"] == 50
    train(out, config, activations=shards, device="cpu", resume=True)
    assert weights(out) == weights(tmp_path / "whole")
    assert all_metrics(out) == all_metrics(tmp_path / "whole")


@pytest.mark.parametrize("live", [False, True])
def test_an_interrupted_run_goes_on_to_the_bit(
    live: bool, shards: Path, shared_lm: Shared, stop_at: Callable[..., Any], tmp_path: Path
) -> None:
    """Several SAEs, Ctrl-C between checkpoints, then a kill after one; as if nothing had been."""
    source: dict[str, Any] = {"model": shared_lm()} if live else {"activations": shards}
    config = replace(
        LIVE if live else CONFIG, init_seed=(0, 1), auxk=0.5, dead_after_tokens=256,
        text=replace(LIVE.text, max_norm_ratio=1.3 if live else 1.03),
    )  # fmt: skip
    expected = train(tmp_path / "whole", config, device="cpu", **source)
    assert sum(expected[0]["excluded"].values()) > 10, "sinks are met on the way"
    out, total = tmp_path / "out", config.tokens
    with pytest.raises(Interrupted, match=r"stopped at step \d+ of .*`resume`") as caught:
        train(out, config, device="cpu", progress=stop_at("train", total // 5), **source)
    assert has_state(out) and not weights(out)
    assert f"step {load_state(out)[1]['step']} of" in str(caught.value)
    with pytest.raises(RuntimeError, match="killed"):
        train(out, config, device="cpu", resume=True, progress=dies_at(4 * total // 5), **source)
    found = train(out, config, device="cpu", resume=True, **source)
    assert len(weights(out)) == 4 and weights(out) == weights(tmp_path / "whole")
    assert all_metrics(out) == all_metrics(tmp_path / "whole")
    for run, other in zip(found, expected, strict=True):
        assert run["excluded"] == other["excluded"] and run["sae"] == other["sae"]
    # Once more changes nothing.
    again = train(out, config, device="cpu", resume=True, **source)
    assert weights(out) == weights(tmp_path / "whole")
    assert [run["final"] for run in again] == [run["final"] for run in found]


def test_resume_before_the_first_state_starts_from_zero(shards: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, layers=(1,), checkpoint_every=10**9)
    train(tmp_path / "whole", config, activations=shards, device="cpu")
    out = tmp_path / "out"
    with pytest.raises(RuntimeError):
        train(out, config, activations=shards, device="cpu", progress=dies_at(1024))
    assert not has_state(out) and len(metrics_of(out)) > 3
    train(out, config, activations=shards, device="cpu", resume=True)
    assert weights(out) == weights(tmp_path / "whole")
    assert metrics_of(out) == metrics_of(tmp_path / "whole")


def test_shards_may_move_between_runs(
    shards: Path, stop_at: Callable[..., Any], tmp_path: Path
) -> None:
    first = write_shards(tmp_path / "first")
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        train(out, CONFIG, activations=first, device="cpu", progress=stop_at("train", 512))
    first.rename(tmp_path / "second")
    train(out, CONFIG, activations=tmp_path / "second", device="cpu", resume=True)
    train(tmp_path / "whole", CONFIG, activations=shards, device="cpu")
    assert weights(out) == weights(tmp_path / "whole")


def test_resume_with_other_settings_is_refused(
    shards: Path, stop_at: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        train(out, CONFIG, activations=shards, device="cpu", progress=stop_at("train", 512))
    other = write_shards(tmp_path / "other", layers=(1, 4))
    cases: list[tuple[TrainConfig, Path, str]] = [
        (replace(CONFIG, k=(5,)), shards, r"`k` \[4\], now it is \[5\]"),
        (replace(CONFIG, tokens=CONFIG.tokens // 2), shards, "`tokens` .*, now it is"),
        (replace(CONFIG, seed=1), shards, "`seed` 0, now it is 1"),
        (replace(CONFIG, text=TextConfig(max_norm_ratio=9.0)), shards, "`max_norm_ratio` 10.0"),
        (CONFIG, other, "was made from other text"),
    ]
    for config, source, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            train(out, config, activations=source, device="cpu", resume=True)
        assert "\n" not in str(caught.value)
    # How often to save is nobody's result, and a lower rate gets past a loss that blew up.
    config = replace(CONFIG, checkpoint_every=64, lr=1e-4)
    train(out, config, activations=shards, device="cpu", resume=True)


def test_resume_with_another_learning_rate(
    shards: Path, stop_at: Callable[..., Any], tmp_path: Path
) -> None:
    """A rate that was too high stops runs, so it may change; leaving it out keeps it."""
    config = replace(CONFIG, layers=(1,), lr=0.03)
    for name, lr in (("kept", None), ("same", 0.03), ("new", 0.001)):
        out = tmp_path / name
        with pytest.raises(Interrupted):
            train(out, config, activations=shards, device="cpu", progress=stop_at("train", 512))
        later = replace(config, lr=lr)
        (run,) = train(out, later, activations=shards, device="cpu", resume=True)
        assert run["sae"]["peak_lr"] == (lr or 0.03)
    assert weights(tmp_path / "kept") == weights(tmp_path / "same") != weights(tmp_path / "new")
    rates = [row["lr"] for row in metrics_of(tmp_path / "new")]
    assert rates[5] == 0.03 and rates[12] == 0.001


def test_a_finished_run_goes_on_with_more_tokens(shards: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, layers=(1,))
    (before,) = train(tmp_path, config, activations=shards, device="cpu")
    longer = replace(config, tokens=2 * config.tokens)
    said: list[str] = []
    (after,) = train(
        tmp_path, longer, activations=shards, device="cpu", resume=True, say=said.append
    )
    assert any(f"goes on from step {config.steps} to {longer.steps}" in line for line in said)
    assert after["final"]["step"] == longer.steps == 2 * before["final"]["step"]
    assert after["extended"] == [{"step": config.steps, "tokens": config.tokens}]
    assert after["complete"] and "extended" not in before
    rows = metrics_of(tmp_path)
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    # The rate was 0 at the first end; it rose again, and is 0 at the second.
    assert rows[-1]["lr"] == 0 and max(row["lr"] for row in rows[len(rows) // 2 :]) > 0
    assert after["final"]["fvu"] < before["final"]["fvu"]
    # Once more changes nothing, and so few tokens are refused.
    held = weights(tmp_path)
    train(tmp_path, longer, activations=shards, device="cpu", resume=True)
    assert weights(tmp_path) == held
    with pytest.raises(UserError, match="was made with `tokens`"):
        train(tmp_path, config, activations=shards, device="cpu", resume=True)


def test_epochs_and_unfinished_harvests_are_said(shards: Path, tmp_path: Path) -> None:
    said: list[str] = []
    warned: list[str] = []
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    options = {"say": said.append, "warn": warned.append, "device": "cpu"}
    train(tmp_path / "whole", CONFIG, activations=folder, **options)
    assert any("epochs make" in line for line in said) and not warned
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    train(tmp_path / "part", CONFIG, activations=folder, **options)
    assert len(warned) == 1 and "stopped after" in warned[0] and "is not complete" in warned[0]
