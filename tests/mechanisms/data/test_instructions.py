"""Where the instruction of a pair is, and what is left of the prompt without it."""

import pytest

from saesteer.checkpoints.errors import UserError
from saesteer.mechanisms.data.instructions import _without, instruction_spans
from saesteer.mechanisms.data.pairs import Pair, load_pairs


@pytest.mark.parametrize(
    ("clean", "corrupt", "said"),
    [
        ("Sun and sea\nAnswer in French.", "Sun and sea", "Answer in French."),
        ("Answer in French.\nSun and sea", "Sun and sea", "Answer in French."),
    ],
)
def test_what_the_other_prompt_lacks(clean: str, corrupt: str, said: str) -> None:
    pair = Pair(clean, corrupt, positions={"query": ((clean.index("Sun"), clean.index("sea") + 3),
                                                     (0, len(corrupt)))})  # fmt: skip
    span, other = instruction_spans(pair)
    assert clean[slice(*span)] == said and other is None
    text, spans = _without(pair, span)
    assert text == corrupt and text[slice(*spans["query"])] == corrupt


def test_the_makers() -> None:
    pair = load_pairs("contrast:animals", n=1)[0]
    span, other = instruction_spans(pair)
    assert pair.clean[slice(*span)] == "Can this animal fly? Say yes or no."
    assert other is not None and pair.corrupt[slice(*other)].startswith("How many legs")
    text, spans = _without(pair, span)
    assert text == f"Animal: {pair.group}\nAnswer:"
    assert text[slice(*spans["query"])] == pair.group and "instruction" not in spans
    task = load_pairs("task:french", n=1)[0]
    assert task.clean[slice(*instruction_spans(task)[0])] == task.clean[len(task.corrupt) + 1 :]


def test_an_instruction_in_the_middle() -> None:
    text = "Word: big. Say it louder. Answer:"
    pair = Pair(text, "x", positions={"instruction": ((11, 25), (0, 1)), "cue": ((26, 33), (0, 1)),
                                      "query": ((6, 9), (0, 1))})  # fmt: skip
    rest, spans = _without(pair, instruction_spans(pair)[0])
    assert rest == "Word: big. Answer:"
    assert rest[slice(*spans["cue"])] == "Answer:" and rest[slice(*spans["query"])] == "big"


def test_no_instruction() -> None:
    for pair in (Pair("one", "two"), Pair("one", "one"), Pair("one  ", "one")):
        with pytest.raises(UserError, match="no instruction is known"):
            instruction_spans(pair)
    with pytest.raises(UserError, match="nothing but the instruction"):
        _without(Pair("Say it.", "x"), (0, 7))
