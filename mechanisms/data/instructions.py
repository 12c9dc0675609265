"""Prompts taken apart: the instruction alone, and the prompt without it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.mechanisms.data.encoding import EncodedPair
from saesteer.mechanisms.data.pairs import Pair, Span
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import EncodedPrompt, encode_prompt

Place = tuple[tuple[int, ...], int]
"""Token ids of a run, and the token in it that is meant."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A pair's clean prompt in parts, as tokens."""

    pair: EncodedPair
    full: Place
    """The whole prompt, and the last token of its instruction."""
    target: Place
    """The prompt without the instruction, and the token that an instruction's state is put at."""
    alone: Place
    """The instruction alone, and its last token."""
    other: Place | None
    """The other instruction of the pair, alone; None where it has none."""
    shuffled: Place | None
    """The words of the instruction in another order; None for a single word."""


def take_apart(
    lm: LanguageModel, pairs: Sequence[EncodedPair], at: str, *, chat: bool, seed: int
) -> list[Asked]:
    """The parts of every pair's clean prompt.

    `at` is a position of the prompt without the instruction: first, last, or a name of the pairs
    (NAME-first, NAME-last). Raises UserError for a pair without an instruction, UsageError for a
    position that is not there.
    """
    drawn = random.Random(seed)
    found = []
    for number, pair in enumerate(pairs, 1):
        try:
            found.append(_take_apart(lm, pair, at, chat, drawn))
        except UserError as error:
            raise type(error)(f"pair {number}: {error}") from None
    return found


def instruction_spans(pair: Pair) -> tuple[Span, Span | None]:
    """The instruction's characters in the clean prompt, and the other one's in the corrupt prompt.

    They are the position `instruction`; without one, what the clean prompt has before or after the
    corrupt one, where that is its beginning or its end. Raises UserError where there is neither.
    """
    if "instruction" in pair.positions:
        return pair.positions["instruction"]
    clean, corrupt = pair.clean, pair.corrupt
    if clean != corrupt and clean.startswith(corrupt):
        rest = clean[len(corrupt) :]
        start = len(clean) - len(rest.lstrip())
        if rest.strip():
            return (start, start + len(rest.strip())), None
    if clean != corrupt and clean.endswith(corrupt):
        rest = clean[: -len(corrupt)]
        if rest.strip():
            start = len(rest) - len(rest.lstrip())
            return (start, start + len(rest.strip())), None
    raise UserError(
        "no instruction is known: give positions a name `instruction`, or a corrupt prompt that is "
        "the clean one without it"
    )


def _take_apart(
    lm: LanguageModel, pair: EncodedPair, at: str, chat: bool, drawn: random.Random
) -> Asked:
    own, other = instruction_spans(pair.of)
    words = pair.of.clean[slice(*own)]
    text, spans = _without(pair.of, own)
    whole, target = encode_prompt(lm, pair.of.clean, chat=chat), encode_prompt(lm, text, chat=chat)
    theirs = None if other is None else pair.of.corrupt[slice(*other)]
    return Asked(
        pair,
        (tuple(whole.token_ids), whole.token_span(*own)[1] - 1),
        (tuple(target.token_ids), _token(target, at, spans)),
        _alone(lm, words, chat),
        None if theirs is None or theirs == words else _alone(lm, theirs, chat),
        _alone(lm, _shuffled(words, drawn), chat) if len(set(words.split())) > 1 else None,
    )


def _without(pair: Pair, span: Span) -> tuple[str, dict[str, Span]]:
    """The clean prompt without a span and the blanks beside it, and its positions there."""
    before, after = pair.clean[: span[0]], pair.clean[span[1] :]
    if not before.strip():
        before = ""
    if not after.strip():
        before, after = before.rstrip(), ""
    elif not before or before[-1].isspace():
        after = after.lstrip()
    text = before + after
    if not text.strip():
        raise UserError("the prompt is nothing but the instruction: there is nothing to put it in")
    moved = len(before) - (len(pair.clean) - len(after))
    spans = {}
    for name, ((start, end), _) in pair.positions.items():
        if end <= span[0]:
            spans[name] = (start, end)
        elif start >= span[1]:
            spans[name] = (start + moved, end + moved)
    return text, spans


def _token(prompt: EncodedPrompt, at: str, spans: dict[str, Span]) -> int:
    if at in ("first", "last"):
        return 0 if at == "first" else len(prompt) - 1
    name, _, end = at.rpartition("-")
    if end not in ("first", "last") or name not in spans:
        name, end = at, "last"
    if name not in spans:
        raise UsageError(
            f"`at` must be of {', '.join(['first', 'last', *spans])} (or NAME-first, NAME-last) in "
            f"the prompt without its instruction, got {at!r}"
        )
    first, past = prompt.token_span(*spans[name])
    return first if end == "first" else past - 1


def _alone(lm: LanguageModel, words: str, chat: bool) -> Place:
    prompt = encode_prompt(lm, words, chat=chat)
    return tuple(prompt.token_ids), prompt.user_span[1] - 1


def _shuffled(words: str, drawn: random.Random) -> str:
    parts = words.split()
    mixed = parts
    while mixed == parts:
        mixed = drawn.sample(parts, len(parts))
    return " ".join(mixed)
