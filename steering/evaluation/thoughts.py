"""Replies without the thoughts before the answer, their tokens too: what is graded and counted."""

from collections.abc import Sequence
from dataclasses import replace

from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.checks.words import ends_thoughts, opens_thoughts, without_thinking
from saesteer.steering.hooking.generation import SteeredText


def answers_only(lm: LanguageModel, replies: Sequence[SteeredText]) -> list[SteeredText]:
    """The replies with completion and tokens of the answer alone, see `without_thinking`.

    Where the chat template itself opens the thoughts, a reply that never closes them is all
    thought. Replies without thoughts stay as they are, and so do all inside `keeping_thoughts`.
    """
    opened = _template_opens(lm)
    found = []
    for reply in replies:
        answer = _answer(reply.completion, opened)
        if answer != reply.completion:
            ids = _last_tokens(lm, reply.token_ids, answer)
            thoughts = reply.thoughts + len(reply.token_ids) - len(ids)
            reply = replace(reply, completion=answer, token_ids=ids, thoughts=thoughts)
        found.append(reply)
    return found


def thought_tokens(lm: LanguageModel, text: str, ids: Sequence[int]) -> int:
    """How many of a reply's first tokens are thoughts, by the rules of `answers_only`."""
    answer = _answer(text, _template_opens(lm))
    return 0 if answer == text else len(ids) - len(_last_tokens(lm, ids, answer))


def _template_opens(lm: LanguageModel) -> bool:
    """Whether the chat template itself writes the mark that begins thoughts."""
    return lm.has_chat_template and opens_thoughts(
        str(
            lm.tokenizer.apply_chat_template(
                [{"role": "user", "content": "?"}], tokenize=False, add_generation_prompt=True
            )
        )
    )


def _answer(reply: str, opened: bool) -> str:
    return "" if opened and not ends_thoughts(reply) else without_thinking(reply)


def _last_tokens(lm: LanguageModel, ids: Sequence[int], answer: str) -> list[int]:
    """The fewest of the last tokens that spell the answer."""
    low, high = 0, len(ids)  # ids[low:] spells it, ids[high:] does not, but for the empty answer
    if not answer:
        return []
    while high - low > 1:
        middle = (low + high) // 2
        if answer in lm.tokenizer.decode(ids[middle:], skip_special_tokens=True):
            low = middle
        else:
            high = middle
    return list(ids[low:])
