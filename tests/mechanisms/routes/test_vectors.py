"""Instruction vectors equal patches made one by one, and say what they cannot."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.mechanisms.data.pairs import Pair, load_pairs
from saesteer.mechanisms.patching.reference import patched_logits
from saesteer.mechanisms.patching.sites import Node, Patch, read_values
from saesteer.mechanisms.reading_config import VectorConfig
from saesteer.mechanisms.reports.saving import save_reading
from saesteer.mechanisms.routes.vectors import _without, added_logits, instruction_vectors
from saesteer.sae.model.language_model import LanguageModel

from ..families import Make, double


@pytest.fixture
def lm(tiny_lm: Make) -> LanguageModel:
    return double(tiny_lm, "llama")


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return load_pairs("contrast:animals", n=4)


def test_the_instruction_is_cut_out(pairs: list[Pair]) -> None:
    pair = _without(pairs[0])
    (start, end), _ = pair.positions["query"]
    assert pair.clean.startswith("Animal: ") and pair.clean.endswith("Answer:")
    assert pair.clean[start:end] == pairs[0].group
    after = Pair("sky. Say it.", "sky. Count it.", positions={"query": ((0, 3),) * 2,
                 "instruction": ((5, 12), (5, 14))})  # fmt: skip
    assert _without(after).clean == "sky."


def test_effects_equal_patches_one_by_one(
    lm: LanguageModel, pairs: list[Pair], tmp_path: Path
) -> None:
    config = VectorConfig(layers=(0, 1, 3), sets=3, best=2, metric="logit-diff")
    found = instruction_vectors(lm, pairs, config)
    assert found.sets == ((0,), (1,), (3,), (0, 1), (0, 3), (1, 3), (0, 1, 3))

    def ids(text: str) -> list[int]:
        return list(lm.tokenizer(text)["input_ids"])

    pair = pairs[1]
    target, instruction = ids(_without(pair).clean), ids("Can this animal fly? Say yes or no.")
    place = len(ids("Animal:"))
    answer, wrong = (ids(f"{pair.clean}{text}")[len(ids(pair.clean))]
                     for text in (pair.answer, pair.wrong))  # fmt: skip
    states, plain = read_values(
        lm, instruction, [(Node("resid_post", layer), len(instruction) - 1) for layer in range(4)]
    )

    def m(logits: torch.Tensor) -> float:
        return float(logits[answer] - logits[wrong])

    base = m(patched_logits(lm, target, []))
    for column, layers in enumerate(found.sets):
        patches = [Patch(Node("resid_post", layer), place, states[layer]) for layer in layers]
        expected = m(patched_logits(lm, target, patches)) - base
        assert found.effects[1, column] == pytest.approx(expected, abs=1e-9), layers
    assert found.base[1] == pytest.approx(base)
    whole = torch.tensor([ids(pair.clean)])
    with torch.no_grad():
        assert found.full[1] == pytest.approx(m(lm.model(input_ids=whole).logits[0, -1]), abs=1e-5)
    assert set(found.controls) == {
        "other instruction", "shuffled words", "random direction", "another query"
    }  # fmt: skip
    assert all(table.shape == (4, 5) for table in found.controls.values())  # 3 blocks, 2 pairs
    assert [row["dose"] for row in found.doses] == [0.25, 0.5, 1.0]
    document = save_reading(tmp_path, found)
    assert document["sets"][0]["low"] is None and len(document["superadditivity"]) == 2
    assert "Do pairs add up?" in (tmp_path / "report.html").read_text()
    plan = found.plan(lm, 3)
    assert plan.layer == 3 and plan.latents[0].mu == pytest.approx(
        float(found.directions[3].norm()), rel=1e-6
    )
    with pytest.raises(UsageError, match="none of the blocks that were read: 0, 1, 3"):
        found.plan(lm, 2)


def test_at_the_last_token_the_later_block_overwrites_the_earlier(lm: LanguageModel) -> None:
    """Which is why such pairs are refused."""
    ids = [5, 9, 77, 42]
    drawn = torch.Generator().manual_seed(0)
    early, late = (
        Patch(Node("resid_post", layer), 3, torch.randn(32, generator=drawn).double())
        for layer in (1, 2)
    )
    both = patched_logits(lm, ids, [early, late])
    assert torch.equal(both, patched_logits(lm, ids, [late]))


def test_bad_pairs_are_refused(lm: LanguageModel, pairs: list[Pair]) -> None:
    with pytest.raises(UsageError, match="`sets` 2 needs a later token than last"):
        instruction_vectors(lm, pairs, VectorConfig(at="last"))
    found = instruction_vectors(lm, pairs[:2], VectorConfig(at="last", sets=1, layers=(3,)))
    assert found.sets == ((3,),) and found.tests == [] and found.doses == []
    bare = [replace(pair, positions={}) for pair in pairs]
    with pytest.raises(UserError, match="positions instruction and query"):
        instruction_vectors(lm, bare)
    with pytest.raises(UsageError, match="out of range"):
        instruction_vectors(lm, pairs, VectorConfig(layers=(9,)))
    with pytest.raises(UsageError, match="over `budget_minutes` 1e-06"):
        instruction_vectors(lm, pairs, VectorConfig(budget_minutes=1e-6))


def test_vectors_are_added_at_one_token(lm: LanguageModel) -> None:
    ids, change = [5, 9, 77, 42], torch.ones(32, dtype=torch.float64)
    found = added_logits(lm, ids, 1, [{}, {2: change}, {0: change, 2: -change}])
    assert torch.allclose(found[0], patched_logits(lm, ids, []), atol=1e-12)
    (state,), _ = read_values(lm, ids, [(Node("resid_post", 2), 1)])
    expected = patched_logits(lm, ids, [Patch(Node("resid_post", 2), 1, state + change)])
    assert torch.allclose(found[1], expected, atol=1e-12)
    assert not np.allclose(found[2], found[0])
