"""Scenes of things in boxes: which thing is in the box that is asked for?"""

import random
from typing import Any

from saesteer.checkpoints.errors import UsageError
from saesteer.mechanisms.data.desiderata import draw_scenes

OBJECTS = (
    "apple", "ball", "bell", "book", "bottle", "bread", "brush", "cake", "camera", "candle",
    "card", "chain", "clock", "coat", "coin", "cup", "disk", "dress", "drum", "egg", "engine",
    "fan", "file", "flag", "flower", "fork", "game", "gift", "glass", "globe", "guitar", "hat",
    "key", "knife", "lamp", "leaf", "letter", "magnet", "map", "medicine", "milk", "mirror", "note",
    "paint", "paper", "pen", "phone", "picture", "plant", "plate", "pot", "radio", "ring", "rock",
    "rose", "shell", "ship", "shirt", "shoe", "stone", "tea", "ticket", "toy", "train", "watch",
)  # fmt: skip
LABELS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")


def box_scenes(boxes: int, n: int, seed: int) -> list[dict[str, Any]]:
    """Fields of `n` pairs: "The apple is in Box F, … Box F contains the", answer " apple".

    The corrupt prompt is another scene whose query label is in neither of the two. Positions:
    `object`, `prev-label` (the earlier mention of the label), `query-label`; in the corrupt scene
    the object and label at the same place in the row. `wrong` is the object of another box.
    """
    if not 2 <= boxes <= 12:  # two scenes and a foreign label need 2 N + 1 letters
        raise UsageError(f"`pairs` boxes:N takes 2..12 boxes, got {boxes}")
    drawn = random.Random(seed)
    rows = []
    for number in range(n):
        letters = drawn.sample(LABELS, 2 * boxes + 1)
        things = drawn.sample(OBJECTS, 2 * boxes)
        asked = drawn.randrange(boxes)
        clean, clean_spans = _scene(things[:boxes], letters[:boxes], asked, letters[asked])
        corrupt, corrupt_spans = _scene(things[boxes:], letters[boxes:-1], asked, letters[-1])
        rows.append(
            {
                "clean": clean,
                "corrupt": corrupt,
                "answer": f" {things[asked]}",
                "wrong": f" {things[(asked + 1) % boxes]}",
                "positions": {
                    name: (clean_spans[name], corrupt_spans[name]) for name in clean_spans
                },
                "group": f"scene {number}",
                "chance": 1 / boxes,
            }
        )
    return rows


def box_desiderata(boxes: int, kind: str, n: int, seed: int) -> list[dict[str, Any]]:
    """Fields of `n` pairs for a mask: `clean` is the base, `corrupt` the source, `answer` what the
    base should give with the source's heads, and `wrong` its own answer. See `desiderata`."""
    drawn = random.Random(seed)
    rows = []
    for number in range(n):
        base, source, wanted = draw_scenes(kind, boxes, LABELS, OBJECTS, drawn)
        (clean, spans), (corrupt, others) = (
            _scene(list(one.things), list(one.labels), one.asked, one.labels[one.asked])
            for one in (base, source)
        )
        rows.append(
            {
                "clean": clean,
                "corrupt": corrupt,
                "answer": f" {wanted}",
                "wrong": f" {base.answer}",
                "positions": {name: (spans[name], others[name]) for name in spans},
                "group": f"scene {number}",
            }
        )
    return rows


def _scene(
    things: list[str], letters: list[str], asked: int, query: str
) -> tuple[str, dict[str, tuple[int, int]]]:
    text, spans = "", {}
    for place, (thing, letter) in enumerate(zip(things, letters, strict=True)):
        text += ", the " if text else "The "
        if place == asked:
            spans["object"] = (len(text), len(text) + len(thing))
        text += f"{thing} is in Box {letter}"
        if place == asked:
            spans["prev-label"] = (len(text) - 1, len(text))
    text += f". Box {query}"
    spans["query-label"] = (len(text) - 1, len(text))
    return f"{text} contains the", spans
