"""Conversations of several turns, and the positions of the assistant's turns in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import EncodedPrompt, check_places, encode_prompt
from saesteer.steering.hooking.tracking.passes import Call


@dataclass(frozen=True, eq=False)
class EncodedChat(EncodedPrompt):
    """A rendered and tokenized conversation; `text` is the last message of the user."""

    messages: tuple[tuple[str, int, int], ...] = ()
    """Of each message: its role, and the range [start, end) of its content in `rendered`."""

    @cached_property
    def template_mask(self) -> Bool[Tensor, " tokens"]:
        """True for tokens outside all messages, and for the system message."""
        mask = torch.ones(len(self), dtype=torch.bool)
        for role, start, end in self.messages:
            if role != "system":
                mask[slice(*_tokens(self, start, end))] = False
        return mask

    @cached_property
    def replies(self) -> tuple[tuple[int, int], ...]:
        """The token range [start, end) of each reply of the assistant."""
        return tuple(
            _tokens(self, start, end) for role, start, end in self.messages if role == "assistant"
        )


def encode_chat(lm: LanguageModel, messages: Sequence[Mapping[str, Any]]) -> EncodedChat:
    """Render and tokenize a conversation that ends with a turn of the user or of a tool.

    Contents are texts or lists of parts of type text. A turn of the assistant without content, that
    only calls a tool, is written by the template, and the scope `assistant` leaves it out.

    `messages` have the keys `role` and `content`. Raises UsageError for a conversation that ends
    otherwise; UserError without a chat template, or when the template changes a message so that it
    cannot be located.
    """
    if not messages or messages[-1].get("role") not in ("user", "tool"):
        raise UsageError("a conversation must end with a message of the role user, or tool")
    contents = [_content(message) for message in messages]
    if not contents[-1].strip():
        raise UsageError("the last message of a conversation is empty: give it content")
    if not lm.has_chat_template:
        raise UserError(f"a conversation needs a chat template and {lm.name} has none")
    rendered = str(
        lm.tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    )
    # Rendered with a marker in place of each content, to see where the template puts it.
    marks = [f"\u2042 {number} \u2042" for number in range(len(messages))]
    marked = str(
        lm.tokenizer.apply_chat_template(
            [
                _with_content(message, mark) if content.strip() else message
                for message, content, mark in zip(messages, contents, marks, strict=True)
            ],
            tokenize=False,
            add_generation_prompt=True,
        )
    )
    places, shift = [], 0
    for message, content, mark in zip(messages, contents, marks, strict=True):
        if not content.strip():
            continue
        start = marked.find(mark) + shift
        if not rendered.startswith(content, start):
            content = content.strip()  # many templates trim what they are given
        if marked.find(mark) < 0 or not rendered.startswith(content, start):
            raise UserError(f"the chat template of {lm.name} rewrites a message: {content[:60]!r}")
        places.append((message["role"], start, start + len(content)))
        shift += len(content) - len(mark)
    check_places(lm)
    encoded = lm.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    _, start, end = places[-1]
    return EncodedChat(
        text=rendered[start:end],
        rendered=rendered,
        token_ids=list(encoded["input_ids"]),
        offsets=list(encoded["offset_mapping"]),
        text_start=start,
        messages=tuple(places),
    )


def _content(message: Mapping[str, Any]) -> str:
    """The text of a message; empty where it has none."""
    content = message.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, Sequence) else [content]
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            raise UsageError(
                "the content of a message must be a text, or a list of parts such as "
                f'{{"type": "text", "text": "..."}}; got {str(part)[:60]!r}'
            )
        texts.append(part["text"])
    return "".join(texts)


def _with_content(message: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The message with another text, in the form that its content has."""
    plain = isinstance(message["content"], str)
    return {**message, "content": text if plain else [{"type": "text", "text": text}]}


def reply_header(lm: LanguageModel) -> str:
    """What the chat template writes before a reply, such as `<|im_start|>assistant\\n`.

    Raises UsageError when there is no template, or it writes nothing there.
    """
    header = ""
    if lm.has_chat_template:
        turn = [{"role": "user", "content": "x"}]
        without, whole = (
            str(lm.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=add))
            for add in (False, True)
        )
        header = whole.removeprefix(without) if whole.startswith(without) else ""
    if not header:
        raise UsageError(
            f"`scope` assistant needs a chat template that begins the reply, and {lm.name} has "
            "none: use generation"
        )
    return header


def reply_tail(lm: LanguageModel) -> tuple[int, ...]:
    """The tokens that the chat template writes after the user's text, up to the reply.

    Raises UsageError when there is no template, or it writes nothing there.
    """
    tail: list[int] = []
    if lm.has_chat_template:
        prompt = encode_prompt(lm, "A sentence.", chat=True)
        tail = prompt.token_ids[prompt.user_span[1] :]
    if not tail:
        raise UsageError(
            f"`scope` tail is what the chat template writes after the user's text, and {lm.name} "
            "has no template, or one that writes nothing there: use last-prompt"
        )
    return tuple(tail)


def check_tail(call: Call, row: int, tail: Sequence[int]) -> None:
    """Raise UserError where a prompt that is known by its tokens alone does not end with a tail."""
    if call.ids is None or call.ids.shape != call.real.shape:
        return
    length = call.prompt_lengths[row]
    tokens = call.ids[row][call.real[row]][:length][-len(tail) :].tolist()
    if tokens != list(tail):
        raise UserError(
            f"`scope` tail: the prompt of row {row} does not end with what the chat template "
            "writes before a reply: send it through the template, or give steer(prompts=...)"
        )


def header_start(prompt: EncodedPrompt, header: str) -> int:
    """The first token of the header that a rendered prompt ends with.

    Raises UserError when the prompt does not end with it.
    """
    if not prompt.rendered.endswith(header):
        raise UserError(
            "`scope` assistant: the prompt does not end with the beginning of a reply: send it "
            "through the chat template"
        )
    return _tokens(prompt, len(prompt.rendered) - len(header), len(prompt.rendered))[0]


def _tokens(prompt: EncodedPrompt, start: int, end: int) -> tuple[int, int]:
    """The range of tokens that overlap the characters [start, end) of `rendered`."""
    inside = [i for i, (a, b) in enumerate(prompt.offsets) if a < end and b > start and b > a]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)
