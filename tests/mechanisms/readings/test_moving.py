"""A state that becomes another row's is answered like it; one that stays is not."""

import pytest
import torch

from saesteer.checkpoints.errors import UserError
from saesteer.mechanisms.data.states import StateRow, read_states
from saesteer.mechanisms.reading_config import ProbeConfig
from saesteer.mechanisms.readings.moving import move_centroids
from saesteer.mechanisms.reports.saving import render_reading

from ..families import Make, double


def test_after_the_last_block_the_answer_follows(tiny_lm: Make) -> None:
    """With one row for each label and input, a centroid is that row's state."""
    lm = double(tiny_lm, "llama")
    names = ("one", "tree", "of", "it", "value", "class", "for", "is", "not")
    plain = [StateRow(f"{w} {x}", w, w, x) for w in ("a", "b", "c") for x in names]
    given = read_states(lm, plain, ("last",)).logits.argmax(-1).tolist()
    said = {(r.label, r.input): lm.tokenizer.decode([t]) for r, t in zip(plain, given, strict=True)}
    # Only answers whose text is read back as the same token.
    lost = {r.input for r, t in zip(plain, given, strict=True)
            if lm.tokenizer(said[r.label, r.input])["input_ids"] != [t]}  # fmt: skip
    plain = [row for row in plain if row.input not in lost]
    assert plain
    rows = [
        StateRow(r.text, r.label, r.group, r.input,
                 answers={label: said[label, r.input] for label in ("a", "b", "c")})
        for r in plain
    ]  # fmt: skip
    found = move_centroids(lm, rows, ProbeConfig(draws=2), at=("last",))
    last = found.rows[-1]
    assert last["layer"] == 4 and last["switched"] == 1 and last["kept"] == 0
    assert last["n"] >= 2 and last["random"] < 1
    assert "switch rate by layer" in render_reading(found) and "last layer" in repr(found)


def test_rows_without_answers(tiny_lm: Make) -> None:
    rows = [StateRow("a one", "a", "a", "one", answers={"a": " x", "b": " x"})]
    with pytest.raises(UserError, match="no answers that differ"):
        move_centroids(double(tiny_lm, "llama"), rows, at=("last",))


def test_batches_do_not_change_states(tiny_lm: Make) -> None:
    lm = double(tiny_lm, "llama")
    rows = [StateRow(text, "a", "a", positions={"q": (0, 1)}) for text in ("x", "x y z", "x yes")]
    together = read_states(lm, rows, ("last", "q"))
    for number, row in enumerate(rows):
        alone = read_states(lm, [row], ("last", "q"))
        assert torch.allclose(together.logits[number], alone.logits[0], atol=1e-5)
        for name in ("last", "q"):
            assert torch.allclose(together.at[name][number], alone.at[name][0], atol=1e-5)
