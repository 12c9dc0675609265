"""Pairs as tokens: both prompts, the answers' ids, and where each named position lies."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.mechanisms.data.pairs import Pair
from saesteer.sae.model.language_model import LanguageModel, uncompiled
from saesteer.sae.text.prompts import EncodedPrompt, encode_prompt


@dataclass(frozen=True, eq=False)
class EncodedPair:
    """A pair as a model reads it."""

    clean: list[int]
    corrupt: list[int]
    answer: int
    """Id of the token that stands for the answer: its first."""
    wrong: int | None
    places: dict[str, tuple[int, int]]
    """Position name -> the token in `clean` and in `corrupt`."""
    group: str
    chance: float | None
    longer: bool
    """Whether the answer has more tokens than the one that is scored."""
    of: Pair
    """The texts."""

    @property
    def equal_length(self) -> bool:
        """Whether both prompts have the same number of tokens."""
        return len(self.clean) == len(self.corrupt)

    def place(self, name: str) -> tuple[int, int]:
        """The token of a position in both prompts. Raises UsageError for an unknown name."""
        if name.startswith("token:"):
            return (int(name[6:]),) * 2
        if name not in self.places:
            raise UsageError(f"`at` must be one of {', '.join(self.places)} or all, got {name!r}")
        return self.places[name]


def encode_pairs(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    *,
    chat: bool = False,
    allow_copies: bool = False,
    drop: bool = False,
) -> tuple[list[EncodedPair], list[str]]:
    """The pairs as tokens. With `drop`, pairs that cannot be scored are left out, and the second
    result says why; otherwise the first one raises.

    Raises UserError for an answer whose first token is the wrong one's, or the query's own unless
    `allow_copies`; for a position that covers no token; when no pair is left.
    """
    found: list[EncodedPair] = []
    refused: list[str] = []
    for number, pair in enumerate(pairs, 1):
        try:
            found.append(_encode(lm, pair, chat, allow_copies))
        except _Unusable as error:
            if not drop:
                raise UserError(f"pair {number}: {error}") from None
            refused.append(f"pair {number}: {error}")
        except UserError as error:
            raise type(error)(f"pair {number}: {error}") from None
    if not found:
        first = f", first {refused[0]}" if refused else ""
        raise UserError(f"`pairs` holds no pair that can be scored{first}")
    return found, refused


class _Unusable(UserError):
    """A pair whose answer cannot be told from another."""


def _encode(lm: LanguageModel, pair: Pair, chat: bool, allow_copies: bool) -> EncodedPair:
    prompts = (
        encode_prompt(lm, pair.clean, chat=chat),
        encode_prompt(lm, pair.corrupt, chat=chat),
    )
    places = {"first": (0, 0), "last": (len(prompts[0]) - 1, len(prompts[1]) - 1)}
    query: set[int] = set()
    for name, spans in pair.positions.items():
        tokens = [_tokens(p, span, name) for p, span in zip(prompts, spans, strict=True)]
        first, last = tuple(t[0] for t in tokens), tuple(t[1] - 1 for t in tokens)
        places[name] = places[f"{name}-last"] = (last[0], last[1])
        places[f"{name}-first"] = (first[0], first[1])
        if name == "query":
            query = set(prompts[0].token_ids[tokens[0][0] : tokens[0][1]])
    answer, wrong, longer = _answers(lm, pair, prompts)
    if answer == wrong:
        raise _Unusable(
            f"answer and wrong begin with the same token {lm.tokenizer.decode([answer])!r}: they "
            "cannot be told apart by the next token; give others"
        )
    if answer in query and pair.answer is not None and not allow_copies:
        raise _Unusable(
            f"the answer {pair.answer!r} begins with the query's own token "
            f"{lm.tokenizer.decode([answer])!r}, so that copying would score: give another "
            "answer, or `allow_copies`"
        )
    return EncodedPair(
        prompts[0].token_ids, prompts[1].token_ids, answer, wrong, places,
        pair.group or pair.clean, pair.chance, longer, pair,
    )  # fmt: skip


def _tokens(prompt: EncodedPrompt, span: tuple[int, int], name: str) -> tuple[int, int]:
    try:
        return prompt.token_span(*span)
    except UserError:
        said = prompt.text[slice(*span)]
        raise UserError(f"position {name!r} ({said!r}) covers no token") from None


def _answers(
    lm: LanguageModel, pair: Pair, prompts: tuple[EncodedPrompt, EncodedPrompt]
) -> tuple[int, int | None, bool]:
    """Id of the answer, id of the wrong one, and whether the answer goes on after its token."""
    if pair.answer is None:
        own = [_next_token(lm, prompt.token_ids) for prompt in prompts]
        return own[0], own[1], False
    answer = _following(lm, prompts[0], pair.answer)
    wrong = None if pair.wrong is None else _following(lm, prompts[0], pair.wrong)[0]
    return answer[0], wrong, len(answer) > 1


def _next_token(lm: LanguageModel, ids: list[int]) -> int:
    rows = torch.tensor([ids], device=lm.device)
    with torch.no_grad():
        logits = uncompiled(lm.model)(input_ids=rows, use_cache=False, logits_to_keep=1).logits
    return int(logits[0, -1].argmax())


def _following(lm: LanguageModel, prompt: EncodedPrompt, answer: str) -> list[int]:
    """The tokens of `answer` where it follows the prompt."""

    def ids(text: str) -> list[int]:
        return list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])

    before, whole = ids(prompt.rendered), ids(prompt.rendered + answer)
    if whole[: len(before)] != before or len(whole) == len(before):
        raise _Unusable(
            f"the answer {answer!r} melts into the last token of the text before it: move the "
            "space between them to the answer's front"
        )
    return whole[len(before) :]


def every_token(pairs: Sequence[EncodedPair]) -> list[str]:
    """Position names `token:0`, … for runs of one length. Raises UsageError for others."""
    lengths = {len(ids) for pair in pairs for ids in (pair.clean, pair.corrupt)}
    if len(lengths) != 1:
        raise UsageError(
            f"`at` all needs runs of one length, got {min(lengths)} to {max(lengths)} tokens: name "
            "positions instead"
        )
    return [f"token:{t}" for t in range(lengths.pop())]
