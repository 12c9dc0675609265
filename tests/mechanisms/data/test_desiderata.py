"""Scenes for masks: what is wanted follows from one property, and from no other."""

import random
from collections import Counter

import pytest

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.data.desiderata import draw_scenes
from saesteer.mechanisms.data.pairs import load_pairs
from saesteer.mechanisms.toys.hand_built import hand_built_desiderata

LETTERS, THINGS = list("ABCDEFGHIJ"), [f"thing{i}" for i in range(10)]


@pytest.mark.parametrize("kind", ["object", "position", "label"])
def test_one_property_alone_gives_the_answer(kind: str) -> None:
    drawn = random.Random(0)
    asked = Counter()
    for _ in range(200):
        base, source, wanted = draw_scenes(kind, 4, LETTERS, THINGS, drawn)
        asked[base.asked] += 1
        by_object = source.answer
        by_position = base.things[source.asked]
        label = source.labels[source.asked]
        by_label = base.things[base.labels.index(label)] if label in base.labels else None
        told = {"object": by_object, "position": by_position, "label": by_label}
        assert told.pop(kind) == wanted
        assert wanted not in told.values() and wanted != base.answer
        assert not set(base.things) & set(source.things)
        assert len(set(source.labels)) == 4
    # Bases ask for each box equally often: four standard errors of 200 / 4.
    assert all(abs(count - 50) < 25 for count in asked.values()) and len(asked) == 4


def test_pairs_of_both_forms() -> None:
    pair = load_pairs("boxes:3:label", n=2, seed=1)[0]
    label = pair.corrupt[slice(*pair.positions["query-label"][1])]
    assert f"the{pair.answer} is in Box {label}" in pair.clean.replace("The", "the")
    scene = hand_built_desiderata("label", 1, 0)[0]
    assert f"{scene.corrupt[-1]}{scene.answer}" in scene.clean


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("boxes:3:colour", "takes a kind of object, position, label, got 'colour'"),
        ("boxes:2:label", "boxes:N:label takes 3..13 boxes, got 2"),
        ("boxes:x:label", "takes a number of boxes, got 'x'"),
    ],
)
def test_what_cannot_be_made(source: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_pairs(source)
