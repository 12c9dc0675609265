"""Documents that answers are sent as: OpenAI's, with what steering did in a field of its own."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.serving.generation import Facts, Finished, Token
from saesteer.steering.serving.routes.requests import Asked
from saesteer.steering.serving.sampling import TokenLogprobs

Document = dict[str, Any]


@dataclass
class _Choice:
    """What is known of one answer so far."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    end: Finished | None = None
    offset: int = 0


class Answer:
    """Collects the events of a request, and writes them as one document or as chunks."""

    def __init__(self, lm: LanguageModel, asked: Asked, *, chat: bool) -> None:
        self._lm, self._asked, self._chat = lm, asked, chat
        request = asked.generation
        self.choices = [_Choice() for _ in range(len(request.prompts) * request.n)]
        kind = "chat.completion" if chat else "text_completion"
        self._head: Document = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": f"fp_{lm.fingerprint}",
        }

    @property
    def complete(self) -> bool:
        """Whether every answer has ended."""
        return all(choice.end is not None for choice in self.choices)

    def take(self, event: Token | Finished) -> None:
        """Note an event."""
        choice = self.choices[event.choice]
        if isinstance(event, Finished):
            choice.end = event
        else:
            choice.text += event.text
            choice.tokens.append(event)

    def whole(self) -> Document:
        """The answer as one document."""
        choices = [self._whole_choice(i, choice) for i, choice in enumerate(self.choices)]
        return {**self._head, "choices": choices, "usage": self._usage()}

    def _whole_choice(self, index: int, choice: _Choice) -> Document:
        assert choice.end is not None
        said = self._echoed(index) + choice.text
        document: Document = {"index": index, "finish_reason": choice.end.reason}
        if self._chat:
            document["message"] = {"role": "assistant", "content": said, "refusal": None}
        else:
            document["text"] = said
        document["logprobs"] = self._logprobs(choice, choice.tokens)
        document["steering"] = self._steering(index, choice.end.facts)
        if self._asked.generation.watched:
            document["tokens"] = [{"index": t.index, "text": t.piece} for t in _new(choice.tokens)]
            document["activations"] = [one for t in choice.tokens for one in _activations(t)]
            document["prompt_activations"] = self._on_prompt(index, choice.tokens[0])
        return document

    # --- chunks ---

    def opening(self) -> list[Document]:
        """The chunks before the first token."""
        if self._chat:
            return [
                self._chunk(i, {"role": "assistant", "content": ""})
                for i in range(len(self.choices))
            ]
        return [self._chunk(i, said) for i in range(len(self.choices)) if (said := self._echoed(i))]

    def chunk(self, event: Token | Finished) -> Document | None:
        """The chunk that tells of an event; None where it says nothing."""
        self.take(event)
        index = event.choice
        choice = self.choices[index]
        if isinstance(event, Finished):
            empty: Any = {} if self._chat else ""
            last = self._chunk(index, empty, reason=event.reason)
            last["choices"][0]["steering"] = self._steering(index, event.facts)
            return last
        told = bool(event.text or event.activations or event.prompt_activations)
        logprobs = self._logprobs(choice, [event])
        if not told and logprobs is None and not (self._asked.generation.watched and event.piece):
            return None
        document = self._chunk(index, {"content": event.text} if self._chat else event.text)
        own = document["choices"][0]
        own["logprobs"] = logprobs
        if self._asked.generation.watched:
            own["tokens"] = [{"index": t.index, "text": t.piece} for t in _new([event])]
            own["activations"] = _activations(event)
            if event.prompt_activations:
                own["prompt_activations"] = self._on_prompt(index, event)
        return document

    def closing(self) -> Document | None:
        """The chunk with the number of tokens, where it was asked for."""
        if not self._asked.include_usage:
            return None
        return {**self._chunk_head(), "choices": [], "usage": self._usage()}

    def _chunk_head(self) -> Document:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind}

    def _chunk(self, index: int, delta: Any, *, reason: str | None = None) -> Document:
        name = "delta" if self._chat else "text"
        choice = {"index": index, name: delta, "logprobs": None, "finish_reason": reason}
        return {**self._chunk_head(), "choices": [choice]}

    # --- parts ---

    def _echoed(self, index: int) -> str:
        """The prompt of a choice, where the answer is to begin with it."""
        request = self._asked.generation
        prompt = request.prompts[index // request.n]
        if not self._asked.echo:
            return ""
        return prompt.text or str(self._lm.tokenizer.decode(prompt.token_ids))

    def _usage(self) -> Document:
        request = self._asked.generation
        prompts = sum(len(prompt) for prompt in request.prompts)
        new = sum(len(choice.end.facts.token_ids) for choice in self.choices if choice.end)
        return {
            "prompt_tokens": prompts,
            "completion_tokens": new,
            "total_tokens": prompts + new,
        }

    def _steering(self, index: int, facts: Facts) -> Document:
        request = self._asked.generation
        document: Document = {
            "plans": len(request.plans),
            "tokens_touched": facts.tokens_touched,
            "tokens_changed": facts.tokens_changed,
            "tokens_gated_off": facts.tokens_gated_off,
            "relative_dose": facts.relative_dose,
            "seed": request.seed + index,
            "token_ids": list(facts.token_ids),
        }
        if request.measured:
            document["nats_per_token"] = {
                "steered": facts.nats_steered,
                "unsteered": facts.nats_plain,
            }
        return document

    def _on_prompt(self, index: int, first: Token) -> list[Document]:
        request = self._asked.generation
        prompt = request.prompts[index // request.n]
        texts = [self._text(token) for token in prompt.token_ids]
        return [
            {"text": text, "values": list(values)}
            for text, values in zip(texts, first.prompt_activations, strict=True)
        ]

    def _logprobs(self, choice: _Choice, tokens: Sequence[Token]) -> Document | None:
        if not self._asked.wants_logprobs:
            return None
        known = [(t.token, t.logprobs) for t in tokens if t.token is not None and t.logprobs]
        if self._chat:
            content = [
                {**self._of_chat(token, found.chosen), "top_logprobs": self._top(found)}
                for token, found in known
            ]
            return {"content": content, "refusal": None}
        offsets = []
        for token, _ in known:
            offsets.append(choice.offset)
            choice.offset += len(self._text(token))
        return {
            "tokens": [self._text(token) for token, _ in known],
            "token_logprobs": [found.chosen for _, found in known],
            "top_logprobs": [
                {self._text(token): value for token, value in found.top} for _, found in known
            ],
            "text_offset": offsets,
        }

    def _top(self, found: TokenLogprobs) -> list[Document]:
        return [self._of_chat(token, value) for token, value in found.top]

    def _of_chat(self, token: int, logprob: float) -> Document:
        data = token_bytes(self._lm.tokenizer, token)
        return {
            "token": self._text(token),
            "logprob": logprob,
            "bytes": None if data is None else list(data),
        }

    def _text(self, token: int) -> str:
        data = token_bytes(self._lm.tokenizer, token)
        if data is None:
            return str(self._lm.tokenizer.decode([token]))
        return data.decode("utf-8", errors="replace")


def _new(tokens: Sequence[Token]) -> list[Token]:
    return [token for token in tokens if token.token is not None]


def _activations(token: Token) -> list[Document]:
    return [{"index": index, "values": list(values)} for index, values in token.activations]


@lru_cache
def _bytes_of_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes as."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    letters = {chr(value): value for value in printable}
    return {**letters, **{chr(256 + i): value for i, value in enumerate(others)}}


def token_bytes(tokenizer: Any, token: int) -> bytes | None:
    """The bytes that a token stands for; None for one that the vocabulary does not have."""
    word = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(word, str):
        return None
    if len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
        return bytes([int(word[3:5], 16)])
    if token in (tokenizer.all_special_ids or ()):
        return word.encode()
    text = str(tokenizer.decode([token]))
    letters = _bytes_of_letters()
    if "\ufffd" in text and all(letter in letters for letter in word):
        return bytes(letters[letter] for letter in word)
    if word.startswith("\u2581") and not text.startswith(" "):
        text = " " + text  # SentencePiece leaves out the blank in front of a text's first word
    return text.encode("utf-8", errors="replace")
