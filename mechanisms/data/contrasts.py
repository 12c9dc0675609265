"""Two instructions about the same words, so that only the instruction decides the answer."""

import random
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Contrast:
    """Two instructions, and the words with the answer to each."""

    instruction: str
    other: str
    cue: str
    """What stands before the word."""
    words: tuple[tuple[str, str, str], ...]
    """The word, its answer to `instruction`, its answer to `other`."""


def _rows(text: str) -> tuple[tuple[str, str, str], ...]:
    found = [line.split() for line in text.strip().splitlines()]
    return tuple((word, first, second) for word, first, second in found)


CONTRASTS = {
    "adjectives": Contrast(
        "Give the comparative of the adjective.",
        "Give the opposite of the adjective.",
        "Adjective",
        _rows("""
            big bigger small
            small smaller big
            tall taller short
            short shorter long
            fast faster slow
            slow slower fast
            old older young
            young younger old
            hot hotter cold
            cold colder hot
            hard harder soft
            soft softer hard
            strong stronger weak
            weak weaker strong
            rich richer poor
            poor poorer rich
            loud louder quiet
            quiet quieter loud
            dark darker light
            bright brighter dark
            high higher low
            low lower high
            thick thicker thin
            thin thinner thick
            wide wider narrow
            narrow narrower wide
            deep deeper shallow
            cheap cheaper expensive
            clean cleaner dirty
            dirty dirtier clean
            easy easier difficult
            early earlier late
            late later early
            good better bad
            bad worse good
            happy happier sad
            sad sadder happy
            heavy heavier light
            sharp sharper blunt
            smooth smoother rough
        """),
    ),
    "animals": Contrast(
        "Can this animal fly? Say yes or no.",
        "How many legs does this animal have?",
        "Animal",
        _rows("""
            eagle yes two
            sparrow yes two
            owl yes two
            crow yes two
            pigeon yes two
            swallow yes two
            falcon yes two
            gull yes two
            robin yes two
            parrot yes two
            stork yes two
            bee yes six
            wasp yes six
            moth yes six
            fly yes six
            mosquito yes six
            butterfly yes six
            ant no six
            flea no six
            spider no eight
            scorpion no eight
            tick no eight
            dog no four
            cat no four
            horse no four
            cow no four
            lion no four
            tiger no four
            elephant no four
            mouse no four
            rabbit no four
            goat no four
            sheep no four
            wolf no four
            bear no four
            frog no four
            ostrich no two
            penguin no two
            emu no two
            kangaroo no two
        """),
    ),
}


def contrast_rows(name: str, n: int, seed: int) -> list[dict[str, Any]]:
    """Fields of at most `n` pairs: the first instruction with a word, the other with the same word.

    Both answers follow "Answer:" with a space. Positions: `instruction`, `query`.
    """
    contrast = CONTRASTS[name]
    words = list(contrast.words)
    random.Random(seed).shuffle(words)
    rows = []
    for word, first, second in words[:n]:
        clean, clean_spans = _prompt(contrast.instruction, contrast.cue, word)
        corrupt, corrupt_spans = _prompt(contrast.other, contrast.cue, word)
        rows.append(
            {
                "clean": clean,
                "corrupt": corrupt,
                "answer": f" {first}",
                "wrong": f" {second}",
                "positions": {key: (clean_spans[key], corrupt_spans[key]) for key in clean_spans},
                "group": word,
            }
        )
    return rows


def _prompt(instruction: str, cue: str, word: str) -> tuple[str, dict[str, tuple[int, int]]]:
    start = len(instruction) + 1 + len(cue) + 2
    text = f"{instruction}\n{cue}: {word}\nAnswer:"
    return text, {"instruction": (0, len(instruction)), "query": (start, start + len(word))}
