"""Instruction vectors: equal to patches made one by one, zero where they must be, and a plan."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.mechanisms.config import VectorConfig
from saesteer.mechanisms.data.pairs import Pair
from saesteer.mechanisms.patching.reference import patched_logits
from saesteer.mechanisms.patching.sites import Node, Patch, read_values
from saesteer.mechanisms.patching.vectors import effects_of, instruction_vectors, vector_runs
from saesteer.mechanisms.reports.vector_page import save_vectors
from saesteer.mechanisms.reports.vector_result import LayerSet
from saesteer.sae.model.language_model import LanguageModel, wrap_model

Make = Callable[..., tuple[Any, Any]]
CLEAN, OTHER = "Return the type.", "Not the name, or of it."
WORDS = ("name", "class", "type", "value", "self", "return", "function", "import")


def make_pairs(words: tuple[str, ...] = WORDS) -> list[Pair]:
    pairs = []
    for word in words:
        clean, corrupt = (f"{text} A word: {word} is" for text in (CLEAN, OTHER))
        spans = {
            "instruction": ((0, len(CLEAN)), (0, len(OTHER))),
            "query": ((len(CLEAN) + 9, len(clean) - 3), (len(OTHER) + 9, len(corrupt) - 3)),
        }
        pairs.append(Pair(clean, corrupt, " in", " of", spans, group=word))
    return pairs


@pytest.fixture
def lm(tiny_lm: Make) -> LanguageModel:
    model, tokenizer = tiny_lm("llama")
    return wrap_model(model.double(), tokenizer)


@pytest.mark.parametrize(("taken", "doses"), [("alone", ()), ("full", (0.5, 1.0))])
def test_effects_are_those_of_patches_one_by_one(
    lm: LanguageModel, taken: str, doses: tuple[float, ...]
) -> None:
    config = VectorConfig(sets=2, taken=taken, doses=doses, allow_copies=True)
    runs = vector_runs(lm, make_pairs(), config)
    result = effects_of(runs)
    one = runs.asked[2]
    assert lm.tokenizer.decode(one.target[0]).strip() == "A word: type is"
    assert lm.tokenizer.decode(one.alone[0]) in (CLEAN, "<s>" + CLEAN)
    place = one.full if taken == "full" else one.alone
    nodes = [Node("resid_post", layer) for layer in range(lm.n_layers)]
    new, _ = read_values(lm, place[0], [(node, place[1]) for node in nodes])
    old, logits = read_values(lm, one.target[0], [(node, one.target[1]) for node in nodes])

    def difference(x: torch.Tensor) -> float:
        return float(x[one.pair.answer] - x[one.pair.wrong])

    for layers in ((0,), (3,), (1, 2), (0, 3)):
        for dose in doses or (None,):
            values = [new[i] if dose is None else dose * (new[i] - old[i]) for i in layers]
            patches = [Patch(nodes[i], one.target[1], value, adds=dose is not None)
                       for i, value in zip(layers, values, strict=True)]  # fmt: skip
            changed = patched_logits(lm, one.target[0], patches)
            found = result.effects[2, result.sets.index(LayerSet(layers, dose))]
            assert found == pytest.approx(difference(changed) - difference(logits), abs=1e-10)
    assert set(result.controls) == {"other", "shuffled", "random", "another query"}
    assert result.controls["other"].shape == (8, len(result.compared))
    if doses:  # the whole difference, added in one layer, is the state itself
        plain = effects_of(replace(runs, config=VectorConfig(taken=taken)))
        assert result.effects[:, 1] == pytest.approx(plain.effects[:, 0], abs=1e-10)


def test_a_state_that_is_there_already_does_nothing(lm: LanguageModel) -> None:
    runs = vector_runs(lm, make_pairs(), VectorConfig(controls=False))
    runs.__dict__["states"] = runs.plain
    assert np.abs(effects_of(runs).effects).max() < 1e-12


def test_at_the_last_token_a_pair_is_its_later_layer(lm: LanguageModel) -> None:
    """Why two layers at a last token are refused: f({l1, l2}) is f({l2})."""
    runs = vector_runs(lm, make_pairs(), VectorConfig(at="last", controls=False))
    object.__setattr__(runs, "config", VectorConfig(sets=2, controls=False))
    result = effects_of(runs)
    place = {one.layers: i for i, one in enumerate(result.sets)}
    for first, second in ((0, 2), (1, 3)):
        both, later = (result.effects[:, place[one]] for one in ((first, second), (second,)))
        assert np.abs(both - later).max() < 1e-12


def test_the_summary_and_the_files(lm: LanguageModel, tmp_path: Path) -> None:
    result = instruction_vectors(lm, make_pairs() * 2, VectorConfig(sets=3, allow_copies=True))
    assert [len(one.layers) for one in result.sets] == [1] * 4 + [2] * 6 + [3] * 4
    row = result.summary[result.best]
    assert row["share"] == pytest.approx(row["effect"] / result.whole)
    assert row["low"] < row["effect"] < row["high"] and set(row["controls"]) == set(result.controls)
    assert row["over_other"][0] == pytest.approx(row["effect"] - row["controls"]["other"])
    tested = result.superadditivity
    assert len(tested) == 6 and all(one["groups"] == 4 for one in tested)
    frame = result.to_frame()
    assert len(frame) == 14 and "shuffled" in frame
    document = save_vectors(tmp_path, result)
    assert document["best_layer"] == result.best and "best" in repr(result)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2 and "another query" in page and "<script" not in page


def test_the_plan_adds_the_mean_vector(lm: LanguageModel) -> None:
    runs = vector_runs(lm, make_pairs(), VectorConfig(controls=False))
    result = effects_of(runs)
    plan = result.plan(lm, 2, scope="all")
    added = plan.parts[0].added_vector()
    expected = (runs.states - runs.plain)[:, 2].mean(dim=0)
    torch.testing.assert_close(added, expected, rtol=1e-6, atol=1e-9)
    assert plan.layer == 2 and plan.scope == "all" and result.plan(lm).layer == result.best
    along = expected / expected.norm()
    sigma = float((runs.plain[:, 2] @ along).std(correction=0))
    assert plan.latents[0].sigma == pytest.approx(sigma)
    with pytest.raises(UsageError, match="`plan` 2 is no layer that was patched: choose of 0, 1"):
        instruction_vectors(lm, make_pairs(), VectorConfig(layers=(0, 1), controls=False)).plan(
            lm, 2
        )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sets": 4}, "`sets` must be 1, 2 or 3 layers"),
        ({"sets": 2, "at": "last"}, "`sets` 2 and 3 say nothing at the last token"),
        ({"sets": 2, "at": "query-last"}, "say nothing where query-last is the last token"),
        ({"sets": 2, "metric": "logit"}, "`metric` logit moves with all logits"),
        ({"metric": "kl"}, "`metric` must be of logit-diff"),
        ({"taken": "half"}, "`taken` must be of alone, full"),
        ({"doses": (1.0, 1.0)}, "`doses` must be different numbers above 0"),
        ({"at": "object"}, "pair 1: `at` must be of first, last, query .* got 'object'"),
        ({"layers": (4,)}, "`layer` 4 is out of range"),
    ],
)
def test_what_cannot_be(lm: LanguageModel, settings: dict[str, Any], says: str) -> None:
    pairs = make_pairs()
    if settings.get("at") == "query-last":
        pairs = [Pair(p.clean[:-3], p.corrupt[:-3], " in", " of", p.positions) for p in pairs]
    with pytest.raises(UsageError, match=says):
        instruction_vectors(lm, pairs, VectorConfig(**settings))


def test_pairs_without_an_instruction(lm: LanguageModel) -> None:
    with pytest.raises(UserError, match="pair 1: no instruction is known: give positions a name"):
        instruction_vectors(lm, [Pair("The name is", "A type or", " in", " of")])
    same = [replace(pair, answer=" in", wrong=None) for pair in make_pairs()]
    runs = vector_runs(lm, same, VectorConfig())
    object.__setattr__(runs, "full", runs.base)
    with pytest.raises(UserError, match="nothing to explain: the instruction leaves logprob of"):
        effects_of(runs)
