"""Rows that were not trained on: which they are, and what is measured on them."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.files import read_json, write_json
from saesteer.checkpoints.sae_file import load_sae
from saesteer.checkpoints.shards import ShardReader
from saesteer.sae.activations.batches import LiveSource, ShardSource
from saesteer.sae.activations.reader import ActivationStream, open_activations
from saesteer.sae.config import TextConfig, TrainConfig
from saesteer.sae.model.hooks import resolve_site
from saesteer.sae.training.held_out import (
    held_back_of_shards,
    read_held_out,
    wanted_rows,
)
from saesteer.sae.verbs.reproduce import reproduce
from saesteer.sae.verbs.train import train

from ..training_runs import (
    CONFIG,
    LIVE,
    TOKENS,
    Shared,
    dies_at,
    metrics_of,
    sparse_data,
    weights,
)

PLACE = (1, "resid_post")


def rows_of(tensor: Tensor) -> set[tuple[float, ...]]:
    return {tuple(row) for row in tensor.tolist()}


def drawn(source: Any, count: int) -> Tensor:
    pieces: list[Tensor] = []
    while sum(map(len, pieces)) < count:
        pieces.append(source.next_rows())
    return torch.cat(pieces)


# --- which rows


def test_shards_that_are_all_needed_keep_their_last_rows(shards: Path) -> None:
    config = replace(CONFIG, tokens=3 * TOKENS)
    held_back = held_back_of_shards(config, TOKENS, 1000)
    assert held_back == int(TOKENS * 0.05) < wanted_rows(config)
    source = ShardSource(ShardReader(shards), [PLACE], 10.0, 0, held_back)
    trained = rows_of(drawn(source, 2 * TOKENS))
    rows, why = read_held_out(source, wanted_rows(config))
    assert rows is not None and len(rows) == held_back and why == "no other text was left"
    assert rows_of(rows) == rows_of(sparse_data(TOKENS, 1)[-held_back:])
    assert not trained & rows_of(rows) and len(trained) == TOKENS - held_back


def test_of_longer_shards_the_rest_is_held_out_and_nothing_held_back(shards: Path) -> None:
    assert held_back_of_shards(CONFIG, TOKENS, 1000) == 0
    assert held_back_of_shards(replace(CONFIG, held_out_share=0.0, tokens=TOKENS), TOKENS, 0) == 0
    # One shard is read at once, and what a run does not need of it is not read again.
    assert held_back_of_shards(CONFIG, 3000, 1024) == 102
    source = ShardSource(ShardReader(shards), [PLACE], 10.0, 0)
    assert source.rows_at_once == 1024
    trained = rows_of(drawn(source, 3000))
    before = source.state_dict()
    rows, why = read_held_out(source, 100)
    assert rows is not None and len(rows) == 100 and why == ""
    assert not trained & rows_of(rows)
    assert source.state_dict() == before, "a run that is made longer goes on where it was"
    every, _ = read_held_out(source, 10**6)
    assert every is not None and trained | rows_of(every) == rows_of(sparse_data(TOKENS, 1))
    drawn(source, TOKENS - len(trained) + 1)
    assert read_held_out(source, 100) == (None, "no other text was left")


def lines(folder: Path, count: int = 200) -> tuple[str]:
    path = folder / "lines.jsonl"
    path.write_text(
        "".join(f'{{"text": "line {i} of some text, {i * i}"}}\n' for i in range(count))
    )
    return (str(path),)


@pytest.mark.parametrize("epochs", [1, 2])
def test_live_text_is_never_both(epochs: int, shared_lm: Shared, tmp_path: Path) -> None:
    lm = shared_lm()
    text = TextConfig(data=lines(tmp_path), context=24, batch_size=4, epochs=epochs)
    points = [resolve_site(lm, 1)]

    def opened() -> ActivationStream:
        return open_activations(lm, points, text, replies_folder=tmp_path, held_back=0.2)

    source = LiveSource(opened())
    for _ in range(5 if epochs == 1 else 10**9):
        if source.next_rows() is None:
            break
    state = source.state_dict()
    rows, _ = read_held_out(source, 10**6)
    assert rows is not None and len(rows) > 100 and source.state_dict() == state
    # The same in text: no document is read by both, but the one that the first ended in.
    trained, others = opened().contexts, source.stream.contexts.held_out()
    assert others is not None

    def documents(contexts: Any, batches: int) -> set[str]:
        ids: list[int] = []
        for _ in range(batches):
            batch = contexts.next_batch(4)
            if batch is None:
                break
            ids += batch.token_ids.flatten().tolist()
        return set(re.findall(r"line (\d+) of", lm.tokenizer.decode(ids)))

    both = documents(trained, 5 if epochs == 1 else 10**9) & documents(others, 10**9)
    assert len(both) <= (1 if epochs == 1 else 0)


def test_bad_text_after_the_run_does_not_lose_it() -> None:
    class Broken(LiveSource):
        def __init__(self) -> None:
            self.rows = [torch.ones(3, 2)]
            self.places = [PLACE]
            self.stream = SimpleNamespace(excluded={})  # type: ignore[assignment]

        def held_out(self) -> "Broken":
            return self

        def next_rows(self) -> Tensor:
            if not self.rows:
                raise UserError("line 7 is no JSON")
            return self.rows.pop()

    rows, why = read_held_out(Broken(), 10)
    assert rows is not None and len(rows) == 3 and why == "line 7 is no JSON"


# --- what is measured


def test_figures_are_those_of_the_file(shards: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, tokens=2 * TOKENS, layers=(1,), arch="batchtopk")
    (run,) = train(tmp_path, config, activations=shards, device="cpu")
    sae = load_sae(tmp_path, dtype=torch.float64)
    held_back = held_back_of_shards(config, TOKENS, 1000)
    x = sparse_data(TOKENS, 1)[-held_back:].double()
    error = (x - sae.reconstruct(x)).square().sum() / (x - x.mean(dim=0)).square().sum()
    l0 = (sae.encode(x) != 0).sum().item() / len(x)
    assert run["final"]["held_out_rows"] == held_back
    # Float32 in rows of length 1,000, where a latent at the threshold may fall on either side.
    assert run["sae"]["fvu_heldout"] == pytest.approx(float(error), rel=5e-3)
    assert run["sae"]["l0_heldout"] == pytest.approx(l0, abs=0.02)
    assert run["sae"]["l0_heldout"] == pytest.approx(4, abs=0.02), "the threshold was set on them"
    assert read_json(tmp_path / "run.json")["sae"] == run["sae"]


@pytest.mark.slow
def test_a_small_text_learnt_by_heart_is_warned_of(shards: Path, tmp_path: Path) -> None:
    warned: list[str] = []
    config = TrainConfig(
        layers=(1,), d_sae=(512,), k=(4,), tokens=100 * TOKENS, batch_tokens=256, lr=0.01,
        buffer_tokens=2048, held_out_share=0.5,
    )  # fmt: skip
    (run,) = train(tmp_path, config, activations=shards, device="cpu", warn=warned.append)
    assert run["sae"]["fvu_heldout"] > 1.5 * run["final"]["fvu"]
    before, line = warned
    assert before.startswith("2,048 rows are few for 512 latents: with an L0 of 4 each will be")
    assert line.startswith(f"FVU is {run['final']['fvu']:.3g} on rows trained on and ")
    assert "2,048 rows are few for 512 latents" in line and "has 32 weights" in line


@pytest.mark.parametrize(("d_sae", "few"), [(512, True), (64, False)])
def test_too_few_rows_are_said_before_training(
    d_sae: int, few: bool, shards: Path, tmp_path: Path
) -> None:
    said: list[tuple[str, bool]] = []
    config = replace(CONFIG, arch="topk", layers=(1,), d_sae=(d_sae,), k=(2,), tokens=2048)
    train(
        tmp_path, config, activations=shards, device="cpu",
        warn=lambda line: said.append((line, bool(metrics_of(tmp_path)))),
    )  # fmt: skip
    # 2048 * 2 / 512 = 8 rows for each latent, of 2 * 16 weights; 64 of 64 latents.
    wanted = "2,048 rows are few for 512 latents: with an L0 of 2 each will be active in about 8 of"
    found = [trained for line, trained in said if line.startswith(wanted)]
    assert found == ([False] if few else [])


def test_no_rows_are_said(shared_lm: Shared, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a few words that fill some contexts. " * 300)  # one document
    text = replace(LIVE.text, data=(str(path),), epochs=9)
    warned: list[str] = []
    (run, _) = train(
        tmp_path / "sae", replace(LIVE, text=text, tokens=4096), model=shared_lm(), device="cpu",
        warn=warned.append,
    )  # fmt: skip
    assert run["final"]["held_out_rows"] == 0 and "fvu_heldout" not in run["sae"]
    assert warned == ["no held-out rows to measure the SAE on: no other text was left"]


# --- the rest of a run is as it was


@pytest.mark.parametrize("tokens", [2048, 2 * TOKENS])
def test_runs_stop_resume_and_repeat_with_rows_held_back(
    tokens: int, shards: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, tokens=tokens, layers=(1,))
    train(tmp_path / "whole", config, activations=shards, device="cpu")
    with pytest.raises(RuntimeError, match="killed"):
        train(tmp_path / "out", config, activations=shards, device="cpu", progress=dies_at(1024))
    train(tmp_path / "out", config, activations=shards, device="cpu", resume=True)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert metrics_of(tmp_path / "out") == metrics_of(tmp_path / "whole")
    again, whole = (read_json(tmp_path / name / "run.json")["sae"] for name in ("out", "whole"))
    assert again == whole and "fvu_heldout" in whole
    assert reproduce(tmp_path / "whole")["equal"]


def test_a_run_from_before_is_repeated_with_all_its_rows(shards: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, tokens=2 * TOKENS, layers=(1,), held_out_share=0.0)
    train(tmp_path, config, activations=shards, device="cpu")
    record = read_json(tmp_path / "run.json")
    del record["config"]["held_out_share"]
    write_json(tmp_path / "run.json", record)
    assert reproduce(tmp_path)["equal"]


def test_share_out_of_range() -> None:
    with pytest.raises(UsageError, match=r"`held_out_share` must be in 0\.\.0\.5, got 1\.5"):
        replace(CONFIG, held_out_share=1.5)
