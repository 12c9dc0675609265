"""Runs an engine from a test: requests in, answers out."""

import contextlib
import queue
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import encode_prompt
from saesteer.steering.serving.config import ServeConfig
from saesteer.steering.serving.engine import Engine
from saesteer.steering.serving.generation import Event, Facts, Failed, Finished, Generation, Token

WAIT = 60.0


@dataclass
class Answers:
    """What the engine tells about one request."""

    events: "queue.Queue[Event]" = field(default_factory=queue.Queue)
    tokens: dict[int, list[Token]] = field(default_factory=dict)
    ends: dict[int, Finished] = field(default_factory=dict)

    def first(self, choice: int = 0) -> Token:
        """Wait for the first token."""
        while not self.tokens.get(choice):
            self._take()
        return self.tokens[choice][0]

    def wait(self, choices: int = 1) -> "Answers":
        """Wait for the end of all answers."""
        while len(self.ends) < choices:
            self._take()
        return self

    def _take(self) -> None:
        event = self.events.get(timeout=WAIT)
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            self.ends[event.choice] = event
        else:
            self.tokens.setdefault(event.choice, []).append(event)

    def text(self, choice: int = 0) -> str:
        return "".join(token.text for token in self.tokens[choice])

    def facts(self, choice: int = 0) -> Facts:
        return self.ends[choice].facts


def in_float64(lm: LanguageModel) -> LanguageModel:
    """The model in float64, where the rounding of products of different shapes chooses no token."""
    lm.model.to(torch.float64)
    return lm


def generation(lm: LanguageModel, text: str, *, chat: bool = True, **fields: Any) -> Generation:
    """A request with one prompt."""
    return Generation(prompts=[encode_prompt(lm, text, chat=chat)], **fields)


@contextlib.contextmanager
def running(
    lm: LanguageModel, *, settings: dict[str, Any] | None = None, **rest: Any
) -> Iterator[Engine]:
    """An engine that works while the context is open."""
    engine = Engine(lm, ServeConfig(**(settings or {})), **rest)
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(0.0)
        assert not engine.alive


def ask(engine: Engine, request: Generation) -> Answers:
    answers = Answers()
    engine.submit(request, answers.events.put)
    return answers


def ask_all(engine: Engine, requests: Sequence[Generation], *, apart: bool) -> list[Answers]:
    """All answers; `apart` lets each request come when the one before has its first token."""
    asked = []
    for request in requests:
        asked.append(ask(engine, request))
        if apart:
            asked[-1].first()
    return [answers.wait() for answers in asked]
