"""Answers with labels by construction: good references, and the same ones damaged on purpose.

`references.jsonl` and `held_out.jsonl` hold answers written for contents of the built-in tasks, and
`nonsense.jsonl` word salad as badly steered models write it, also by hand. `damaged` makes the
rest, the same every time. `prompted.jsonl` and `unsteered.jsonl` hold what SmolLM2-135M-Instruct
answers, unlabelled.
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
TRANSLATIONS = ("french", "german", "spanish", "italian")
FREE = ("french_reply",)


TRUTH: dict[str, dict[str, bool]] = {
    "good": dict.fromkeys(("follows", "fluent", "faithful", "strict"), True),
    "other content": {"fluent": True, "faithful": False, "strict": False},
    "shuffled": {"fluent": False, "strict": False},
    "non-words": {"fluent": False, "faithful": False, "strict": False},
    "half translated": {"follows": False, "fluent": False, "strict": False},
    "English opening": {"fluent": False, "strict": False},
    "not translated": {"follows": False, "fluent": False, "strict": False},
    "a loop": {"fluent": False, "faithful": False, "strict": False},
    "salad": {"faithful": False, "strict": False},
}
"""What each grade should say, by how an answer was made; what is left out may be either."""


@dataclass(frozen=True)
class Labelled:
    """One answer."""

    task: str
    content: str
    answer: str
    kind: str
    """good, or the damage."""

    @property
    def good(self) -> bool:
        return self.kind == "good"


def read(name: str) -> list[dict[str, str]]:
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def references(name: str = "references.jsonl") -> list[Labelled]:
    return [Labelled(row["task"], row["content"], row["answer"], "good") for row in read(name)]


def labelled() -> list[Labelled]:
    """Every answer by which the thresholds were chosen: good ones, the same damaged, salad."""
    good = references()
    salad = [
        Labelled(r["task"], r["content"], r["answer"], "salad") for r in read("nonsense.jsonl")
    ]
    return [*good, *damaged(good), *salad]


def held_out() -> list[Labelled]:
    """Answers to other contents, written and damaged after the thresholds were chosen."""
    good = references("held_out.jsonl")
    return [*good, *damaged(good)]


def damaged(good: list[Labelled]) -> Iterator[Labelled]:
    draw = random.Random(0)
    for place, one in enumerate(good):
        same = [other for other in good if other.task == one.task and other.content != one.content]
        yield _as(one, draw.choice(same).answer, "other content")
        yield _as(one, _inside(one, lambda text: _shuffled(text, draw)), "shuffled")
        yield _as(one, _inside(one, lambda text: _misspelt(text, draw)), "non-words")
        words = one.answer.split()
        if one.task in TRANSLATIONS:
            source = one.content.split()
            half = [*words[: len(words) // 2], *source[len(source) // 2 :]]
            yield _as(one, " ".join(half), "half translated")
            yield _as(
                one, f"Sure, here is the translation you asked for: {one.answer}", "English opening"
            )
            yield _as(one, one.content, "not translated")
        if place % 3 == 0:
            start = " ".join(words[:4])
            yield _as(one, " ".join([start] * 8), "a loop")


def _as(one: Labelled, answer: str, kind: str) -> Labelled:
    return Labelled(one.task, one.content, answer, kind)


def _inside(one: Labelled, change: Callable[[str], str]) -> str:
    """Change the words of an answer and keep its form: JSON, a program, quotation marks, items."""
    if one.task == "json":
        body = json.loads(one.answer.removeprefix("```json\n").removesuffix("\n```"))
        return json.dumps({k: change(v) if isinstance(v, str) else v for k, v in body.items()})
    if one.task == "python":
        quoted = r"""(?<=")[^"\n]+ [^"\n]+(?=")|(?<=')[^'"\n]+ [^'"\n]+(?=')"""
        return re.sub(quoted, lambda match: change(match[0]), one.answer)
    if one.task == "bullets":
        return "\n".join(line[:2] + change(line[2:]) for line in one.answer.split("\n"))
    if one.task == "quotes":
        return f'"{change(one.answer[1:-1])}"'
    return change(one.answer)


def _shuffled(text: str, draw: random.Random) -> str:
    """The words in an order in which hardly any keeps its neighbour; the last mark stays last."""
    end = text[-1] if text[-1:] in ".?!" else ""
    words = [word.strip(".,?!;:") for word in text.split()]
    words = [word for word in words if word]
    old = set(zip(words, words[1:], strict=False))
    best = words
    for _ in range(20):
        new = draw.sample(words, len(words))
        kept = sum(pair in old for pair in zip(new, new[1:], strict=False))
        best = new
        if kept <= len(words) // 8:
            break
    return " ".join(best) + end


def _misspelt(text: str, draw: random.Random) -> str:
    """Words of four letters or more with one or two inner letters changed for others."""

    def change(match: re.Match[str]) -> str:
        word = match[0]
        letters = list(word)
        for _ in range(2):
            at = draw.randrange(1, len(letters) - 1)
            pool = "aeiou" if letters[at].lower() in "aeiouéèêàäöü" else "bcdfgklmnprstvz"
            new = draw.choice([c for c in pool if c != letters[at].lower()])
            letters[at] = new.upper() if letters[at].isupper() else new
        return "".join(letters)

    return re.sub(r"[^\W\d_]{4,}", change, text)
