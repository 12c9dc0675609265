"""What is asked of the engine, the rows that it makes of it, and what it tells while they grow."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import EncodedPrompt
from saesteer.steering.plans.plan import Plan
from saesteer.steering.serving.row_edits import RowEdits, Watch
from saesteer.steering.serving.sampling import Sampler, Sampling, TokenLogprobs
from saesteer.steering.serving.text_stream import TextStream


@dataclass(frozen=True, kw_only=True, eq=False)
class Generation:
    """A request: prompts, how each is answered, and what steers the answers."""

    prompts: Sequence[EncodedPrompt]
    n: int = 1
    """Answers to each prompt."""
    plans: Sequence[Plan] = ()
    """Applied in turn, each to what the one before left; none leaves the model as it is."""
    sampling: Sampling = Sampling()
    seed: int = 0
    """Of the first answer; every further one has the next number."""
    max_new_tokens: int = 16
    stops: Sequence[str] = ()
    ignore_end: bool = False
    """Go on after an end-of-text token."""
    watched: Sequence[int] = ()
    """Latents of the server's SAE whose activations are told for every token."""
    measured: bool = False
    """Whether the finished answer is read by the unsteered model, to see how likely it finds it."""
    deadline: float = float("inf")
    """When it has to be answered, by the engine's clock."""


@dataclass(frozen=True)
class Token:
    """A row has a new token, or text that was held back."""

    choice: int
    text: str
    """What the answer's text grows by."""
    token: int | None = None
    """None where only held text, or activations, came."""
    piece: str = ""
    """What the token reads as; pieces are not held back for stop strings."""
    index: int = 0
    """Number of the token in its answer, from 0."""
    logprobs: TokenLogprobs | None = None
    activations: tuple[tuple[int, tuple[float, ...]], ...] = ()
    """Activations of the watched latents at tokens of the answer, each with the token's index. A
    token's are known once it has passed through the model: with the next one."""
    prompt_activations: tuple[tuple[float, ...], ...] = ()
    """With the first token: those at each token of the prompt."""


@dataclass(frozen=True)
class Facts:
    """What is known of a finished answer."""

    token_ids: tuple[int, ...]
    """Without the token that ended it."""
    tokens_touched: int = 0
    tokens_gated_off: int = 0
    tokens_changed: int = 0
    relative_dose: float | None = None
    """Median of ||delta|| / ||h|| over the edited positions."""
    nats_steered: float | None = None
    """Mean of -log p of the answer's tokens for the steered model, where that was asked for."""
    nats_plain: float | None = None
    """The same for the unsteered model: how surprising it finds the answer."""


@dataclass(frozen=True)
class Finished:
    """A row has ended."""

    choice: int
    reason: str
    """`stop`, or `length`."""
    facts: Facts


@dataclass(frozen=True)
class Failed:
    """The whole request has ended without all of its answers."""

    error: Exception


Event = Token | Finished | Failed


class DeadlineError(Exception):
    """A request was not answered in time."""


@dataclass(eq=False)
class Ticket:
    """A request on its way through the engine."""

    request: Generation
    listener: Callable[[Event], None]
    """Called from the engine's thread; must not block."""
    arrived: float
    open_rows: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)
    over: bool = False
    started: bool = False

    def tell(self, event: Event) -> None:
        """Pass an event on, unless nobody listens any more."""
        if not self.cancelled.is_set() and not self.over:
            self.listener(event)


class Row:
    """One answer while it is made."""

    def __init__(
        self, lm: LanguageModel, ticket: Ticket, choice: int, processors: Sequence[Any]
    ) -> None:
        request = ticket.request
        self.ticket, self.choice = ticket, choice
        self.prompt = request.prompts[choice // request.n]
        self.new: list[int] = []
        self.text = TextStream(lm.tokenizer, request.stops)
        seed = request.seed + choice
        self.sampler = Sampler(request.sampling, seed, processors, lm.device)
        self.edits: RowEdits | None = None
        self.watch: Watch | None = None
        self.log_p: list[float] = []
        """Log-probabilities of the new tokens, where the request is measured."""
        self.seen = 0
        """New tokens whose activations have been told."""

    @property
    def length(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.prompt.token_ids) + len(self.new)

    @property
    def longest(self) -> int:
        """Tokens that it may come to hold."""
        return len(self.prompt.token_ids) + self.ticket.request.max_new_tokens

    @property
    def tokens(self) -> list[int]:
        """Prompt and answer so far."""
        return [*self.prompt.token_ids, *self.new]

    def facts(self, nats_plain: float | None) -> Facts:
        """What is known at the end of the answer; `new` is without its end token."""
        length = len(self.new)
        steered = None
        if self.ticket.request.measured and length:
            steered = -sum(self.log_p[:length]) / length
        if self.edits is None or not self.edits.has_run:
            return Facts(tuple(self.new), nats_steered=steered, nats_plain=nats_plain)
        kept, gated_off = self.edits.touched(self.length)
        doses = kept.relative_doses
        return Facts(
            tuple(self.new),
            len(kept.positions),
            gated_off,
            int((kept.delta_norms > 0).sum()),
            float(torch.quantile(doses.double(), 0.5)) if len(doses) else None,
            steered,
            nats_plain,
        )
