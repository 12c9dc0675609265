"""Scenes for masks over heads: which property of one scene should reach another's answer?

Each is a base, a source, and the answer that the base should give once it holds what the heads in
question had in the source (Davies et al. 2023; Prakash et al. 2024 use three for boxes):

- `object`: the source's own object;
- `position`: the base's object in the box that is as far from the start as the source's;
- `label`: the base's object in the box whose label the source asks for.

The base's own box, drawn evenly, is at another place than the source's, and only under `label` do
the two share labels, which then stand at other places: no property stands in for another.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from saesteer.checkpoints.errors import UsageError

DESIDERATA = ("object", "position", "label")


@dataclass(frozen=True)
class Scene:
    """Boxes in their order, and the one that is asked for."""

    labels: tuple[str, ...]
    things: tuple[str, ...]
    asked: int

    @property
    def answer(self) -> str:
        """What is in the box that is asked for."""
        return self.things[self.asked]


def draw_scenes(
    kind: str, boxes: int, labels: Sequence[str], things: Sequence[str], drawn: random.Random
) -> tuple[Scene, Scene, str]:
    """A base, a source, and the thing that the base should answer. Raises UsageError for an unknown
    kind, or too few boxes, labels or things."""
    fewest = 3 if kind == "label" else 2
    most = min(len(labels), len(things)) // 2
    if kind not in DESIDERATA:
        raise UsageError(
            f"`pairs` boxes:N:KIND takes a kind of {', '.join(DESIDERATA)}, got {kind!r}"
        )
    if not fewest <= boxes <= most:
        raise UsageError(f"`pairs` boxes:N:{kind} takes {fewest}..{most} boxes, got {boxes}")
    letters, objects = drawn.sample(labels, 2 * boxes), drawn.sample(things, 2 * boxes)
    here, there = drawn.sample(range(boxes), 2)
    base = Scene(tuple(letters[:boxes]), tuple(objects[:boxes]), here)
    if kind != "label":
        source = Scene(tuple(letters[boxes:]), tuple(objects[boxes:]), there)
        return base, source, source.answer if kind == "object" else base.things[there]
    other = drawn.choice([place for place in range(boxes) if place not in (here, there)])
    rest = [letter for place, letter in enumerate(base.labels) if place != other]
    drawn.shuffle(rest)
    mixed = (*rest[:there], base.labels[other], *rest[there:])
    return base, Scene(mixed, tuple(objects[boxes:]), there), base.things[other]
