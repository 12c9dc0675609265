"""Training on a model's own activations: text, replies, memory, and text that goes wrong."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.checkpoints.errors import Interrupted, NonFiniteError, UserError
from saesteer.checkpoints.run_state import load_state
from saesteer.checkpoints.sae_file import load_sae
from saesteer.sae.verbs.train import train

from ..training_runs import CONFIG, LIVE, Shared, weights


def test_live_training(shared_lm: Shared, tmp_path: Path) -> None:
    lm = shared_lm()
    runs = train(tmp_path / "saes", LIVE, model=lm, device="cpu")
    assert [run["sae"]["layer"] for run in runs] == [0, 3]
    for run in runs:
        assert run["model"]["hash"] == lm.fingerprint
        assert run["data"][0]["name"] == "python-docs"
        assert run["excluded"]["special"] > 0
        spec = load_sae(run["folder"]).spec
        assert spec.hf_hook_name == f"model.layers.{run['sae']['layer']}"
        assert spec.metadata["context_size"] == 24
        assert spec.metadata["saesteer"]["text"][0]["sha256"] == run["data"][0]["sha256"]


def test_live_training_with_replies(shared_lm: Shared, tmp_path: Path) -> None:
    few = replace(LIVE, layers=(1,), tokens=512)
    options: dict[str, Any] = {"replies_folder": tmp_path / "replies", "device": "cpu"}
    (run,) = train(
        tmp_path / "sae", few, model=shared_lm(), replies=["Say one", "Say two"], **options
    )
    (path,) = (tmp_path / "replies").iterdir()
    assert [entry["name"] for entry in run["data"]] == ["python-docs", path.name]


def test_a_corpus_that_ends_is_an_error(shared_lm: Shared, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a few words that fill some contexts. " * 40)
    text = replace(LIVE.text, data=(str(path),))
    # With nothing held back, since one epoch holds nothing back.
    config = replace(LIVE, text=text, checkpoint_every=10**9, held_out_share=0.0)
    with pytest.raises(
        UserError, match=r"the corpus ended after \d+ of 1024 `tokens`.*`epochs`"
    ) as caught:
        train(tmp_path / "sae", config, model=shared_lm(), device="cpu")
    step = load_state(tmp_path / "sae")[1]["step"]
    assert step > 0 and f"`resume` goes on from step {step}" in str(caught.value)
    enough = replace(config, text=replace(config.text, epochs=9))
    train(tmp_path / "two", enough, model=shared_lm(), device="cpu")
    # What was trained before the end is kept, and more epochs lead to the same weights.
    train(tmp_path / "sae", enough, model=shared_lm(), device="cpu", resume=True)
    assert weights(tmp_path / "sae") == weights(tmp_path / "two")


def test_a_product_live_is_each_alone(shared_lm: Shared, tmp_path: Path) -> None:
    """One pass of the model, many SAEs; the others change nothing."""
    many = replace(LIVE, d_sae=(24, 48), k=(2, 4), init_seed=(0, 1), tokens=512)
    runs = train(tmp_path / "saes", many, model=shared_lm(), device="cpu")
    assert len(runs) == 16 == len(weights(tmp_path / "saes"))
    few = replace(many, d_sae=(48,), k=(2,), init_seed=(1,))
    train(tmp_path / "few", few, model=shared_lm(), device="cpu")
    for name, content in weights(tmp_path / "few").items():
        assert weights(tmp_path / "saes")[name] == content


def test_memory_is_said_first_and_refused(
    shared_lm: Shared, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    few = replace(CONFIG, tokens=256, init_seed=(0, 1))
    train(tmp_path / "a", few, activations=shards, device="cpu", say=said.append)
    # At most half of the run is in the buffer; two layers and two seeds.
    assert "a shuffle buffer of 128 tokens" in said[0] and "4 SAEs" in said[0]
    assert len(said) == 2 and "0.1 epochs make 256" in said[1]
    monkeypatch.setattr("saesteer.sae.runs.memory_use.free_bytes", lambda device: 10_000)
    sources = (({"activations": shards}, (1, 5)), ({"model": shared_lm()}, (0, 1)))
    for source, layers in sources:
        config = replace(LIVE, layers=layers, tokens=256)
        with pytest.raises(UserError, match="2 SAEs .* are free: give fewer `layer`") as caught:
            train(tmp_path / "b", config, device="cpu", **source)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        assert not weights(tmp_path / "b")


def test_an_automatic_batch_size_is_kept_on_resume(
    shared_lm: Shared, stop_at: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from saesteer.sae.runs import memory_use

    config = replace(LIVE, text=replace(LIVE.text, batch_size=0))
    monkeypatch.setattr(memory_use, "automatic_batch_size", lambda lm, text: 3)
    train(tmp_path / "whole", config, model=shared_lm(), device="cpu")
    with pytest.raises(Interrupted):
        train(tmp_path / "out", config, model=shared_lm(), device="cpu",
              progress=stop_at("train", 300))  # fmt: skip
    # Less is free now: the size stays the one that the run began with.
    monkeypatch.setattr(memory_use, "automatic_batch_size", lambda lm, text: 7)
    (run, _) = train(tmp_path / "out", config, model=shared_lm(), device="cpu", resume=True)
    assert run["config"]["text"]["batch_size"] == 3
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_text_with_nan_stops_with_the_batch_named_and_the_state_before_it(
    fresh_lm: Shared, tmp_path: Path
) -> None:
    lm = fresh_lm()
    train(tmp_path / "whole", LIVE, model=lm, device="cpu")
    weight = lm.model.get_input_embeddings().weight
    original = weight.clone()
    calls = 0

    def poison(module: Any, args: Any, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return output * torch.nan if calls == 9 else output

    handle = lm.blocks[0].register_forward_hook(poison)
    with pytest.raises(NonFiniteError, match="at layer 0 in batch 8.*`resume` goes on from step"):
        train(tmp_path / "out", LIVE, model=lm, device="cpu")
    handle.remove()
    assert torch.equal(weight, original)
    train(tmp_path / "out", LIVE, model=lm, device="cpu", resume=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole"), "no batch was skipped"
