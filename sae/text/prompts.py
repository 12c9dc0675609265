"""A user's text as the model reads it: in the chat template, with the text's position known."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.sae.model.language_model import LanguageModel


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """Token ids of one prompt, and the position of the user's text in them.

    `offsets` are the character spans of each token in `rendered`; `text_start` is where `text`
    begins there. Tokens outside the text belong to the template.
    """

    text: str
    rendered: str
    token_ids: list[int]
    offsets: list[tuple[int, int]]
    text_start: int

    def __len__(self) -> int:
        return len(self.token_ids)

    def token_span(self, start: int, end: int) -> tuple[int, int]:
        """First token and one past the last that overlap characters [start, end) of `text`.

        Raises UserError when no token does.
        """
        low, high = self.text_start + start, self.text_start + end
        inside = [i for i, (a, b) in enumerate(self.offsets) if a < high and b > low and b > a]
        if not inside:
            raise UserError(
                f"`scope` span:{start}-{end} covers no token of a prompt of "
                f"{len(self.text)} characters"
            )
        return inside[0], inside[-1] + 1

    @cached_property
    def user_span(self) -> tuple[int, int]:
        """The tokens of the user's text: the first, and one past the last."""
        return self.token_span(0, len(self.text))

    @cached_property
    def template_mask(self) -> Bool[Tensor, " tokens"]:
        """True for tokens that the template or the tokenizer added."""
        mask = torch.ones(len(self), dtype=torch.bool)
        mask[slice(*self.user_span)] = False
        return mask


def check_prompt(text: str) -> None:
    """Raise UserError for an empty prompt, or one that is no Unicode text."""
    if not text.strip():
        raise UserError("a prompt is empty: give at least one character of text")
    check_text(text, "a prompt")


def check_text(text: str, what: str) -> None:
    """Raise UserError for half of a surrogate pair, of which no tokenizer makes tokens."""
    for place, character in enumerate(text):
        if "\ud800" <= character <= "\udfff":
            raise UserError(
                f"{what} holds half of a surrogate pair (U+{ord(character):04X} after "
                f"{text[max(0, place - 40) : place]!r}), which is no character: an emoji was cut, "
                "or bytes were read that are not UTF-8; mend the text"
            )


def check_places(lm: LanguageModel) -> None:
    """Raise UserError for a tokenizer that does not say where in a text its tokens are."""
    if not getattr(lm.tokenizer, "is_fast", True):
        raise UserError(
            f"the tokenizer of {lm.name} ({type(lm.tokenizer).__name__}, written in Python) does "
            "not say where in a text its tokens are, which prompts and `exclude_template` need: "
            "give a model folder with a tokenizer.json"
        )


_PLACEHOLDER = "\u2042 the text \u2042"


def _render(lm: LanguageModel, text: str) -> str:
    """One user turn in the chat template, ready for the reply."""
    return str(
        lm.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    )


def encode_prompt(lm: LanguageModel, text: str, *, chat: bool) -> EncodedPrompt:
    """Render and tokenize one user turn (`chat`) or plain text.

    Blanks and line breaks at the ends are part of the prompt, unless the template drops them.

    Raises UserError for an empty prompt, one that is no Unicode text or has more tokens than the
    model has positions, a missing chat template, or a template that rewrites the text so that it
    cannot be found again.
    """
    check_prompt(text)
    if chat and not lm.has_chat_template:
        raise UserError(f"`chat` needs a chat template and {lm.name} has none: use `chat=False`")
    rendered, start = text, 0
    if chat:
        rendered = _render(lm, text)
        # Searching for the text itself could find it in the template: "assistant", "user", "a".
        start = _render(lm, _PLACEHOLDER).find(_PLACEHOLDER)
        if not rendered.startswith(text, start):
            text = text.strip()  # many templates trim what they are given
        if start < 0 or not rendered.startswith(text, start):
            raise UserError(f"the chat template of {lm.name} rewrites the prompt: use `chat=False`")
    # A template writes its own BOS, and so does a person who rendered it by hand; other plain texts
    # get the tokenizer's.
    bos = lm.tokenizer.bos_token
    add = not chat and not (bos and rendered.startswith(bos))
    check_places(lm)
    encoded = lm.tokenizer(rendered, add_special_tokens=add, return_offsets_mapping=True)
    ids = list(encoded["input_ids"])
    if lm.positions is not None and len(ids) > lm.positions:
        raise UserError(
            f"a prompt of {len(ids)} tokens is longer than the {lm.positions} positions of "
            f"{lm.name}: shorten the one that begins {text[:40]!r}"
        )
    return EncodedPrompt(text, rendered, ids, list(encoded["offset_mapping"]), start)


Padded = tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]


def pad_left(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> Padded:
    """Token ids and attention mask on the model's device, padded on the left for generation."""
    return _pad(lm, rows, left=True)


def pad_right(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> Padded:
    """Token ids and attention mask, padded on the right: positions are those of single rows."""
    return _pad(lm, rows, left=False)


def _pad(lm: LanguageModel, rows: Sequence[Sequence[int]], left: bool) -> Padded:
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), lm.pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.int64)
        mask[i, place] = 1
    return ids.to(lm.device), mask.to(lm.device)
