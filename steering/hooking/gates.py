"""Gates: conditions on latents that say at which of a scope's positions an edit is made.

    412 > 3                     latent 412 is above 3 at this token
    412 > 3 : 1                 on above 3, and on until it is at 1 or below (hysteresis)
    412 > 3 & !(77 > 1 | 5 > 2) and, not, or; the words `and`, `or`, `not` mean the same
    prompt: 412 > 3             decided once: on for a row where it held at a token of its prompt

Latents are read from the residual before the plan's own edit. The state of a row is kept for each
position, so that rolled-back drafts and chunked passes do not change it, and it moves with its row
when beams are reordered.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Union

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.steering.hooking.tracking.passes import grown

# Generation adds one column at a time: a history grows by this many more than it needs.
_SPARE_COLUMNS = 64

Node = Union["Above", "Not", "Every", "Either"]


@dataclass(frozen=True)
class Above:
    """A latent is above `on`, or was and is still above `off`."""

    latent: int
    on: float
    off: float


@dataclass(frozen=True)
class Not:
    """The negation of a condition."""

    part: Node


@dataclass(frozen=True)
class Every:
    """Conditions joined by `&`."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Either:
    """Conditions joined by `|`."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Gate:
    """A parsed `--gate`; make one with `parse_gate`."""

    root: Node
    on_prompt: bool
    """Decided once, on the prompt's own tokens; it acts from the last of them on."""
    leaves: tuple[Above, ...]
    """The conditions of the expression, in the order written."""

    @property
    def ids(self) -> tuple[int, ...]:
        """The latents it reads, each once, in the order of their first mention."""
        return tuple(dict.fromkeys(leaf.latent for leaf in self.leaves))


_TOKEN = re.compile(r"\s*(?:(-?\d+(?:\.\d*)?(?:e[+-]?\d+)?)|([()>:&|!])|(and|or|not)\b)", re.I)
_WORDS = {"and": "&", "or": "|", "not": "!"}


def parse_gate(text: str) -> Gate:
    """Parse the value of `--gate`; see this module's head for the language.

    `!` binds closest, then `&`, then `|`. Raises UsageError, with an example, for anything else.
    """
    on_prompt = text.strip().lower().startswith("prompt:")
    body = text.strip()[len("prompt:") :] if on_prompt else text
    parser = _Parser(text, body)
    root = parser.either()
    if parser.rest:
        raise parser.error()
    leaves = tuple(_leaves(root))
    if on_prompt and any(leaf.off != leaf.on for leaf in leaves):
        raise UsageError(
            f"`gate` {text!r}: a gate that is decided once on the prompt has no second threshold"
        )
    return Gate(root, on_prompt, leaves)


class _Parser:
    """Recursive descent over the words of a gate."""

    def __init__(self, text: str, body: str) -> None:
        self._text = text
        self.rest: list[str] = []
        at = 0
        while at < len(body.rstrip()):
            found = _TOKEN.match(body, at)
            if found is None:
                raise self.error()
            self.rest.append(_WORDS.get(found[0].strip().lower(), found[0].strip()))
            at = found.end()

    def error(self) -> UsageError:
        return UsageError(
            f"`gate` must be conditions ID > VALUE joined by &, | and !, such as "
            f"'412 > 3 & !(77 > 1)' or '412 > 3 : 1', got {self._text!r}"
        )

    def either(self) -> Node:
        parts = [self.both()]
        while self._take("|"):
            parts.append(self.both())
        return parts[0] if len(parts) == 1 else Either(tuple(parts))

    def both(self) -> Node:
        parts = [self.one()]
        while self._take("&"):
            parts.append(self.one())
        return parts[0] if len(parts) == 1 else Every(tuple(parts))

    def one(self) -> Node:
        if self._take("!"):
            return Not(self.one())
        if self._take("("):
            inside = self.either()
            if not self._take(")"):
                raise self.error()
            return inside
        number = self._next()
        if not number.isdigit() or not self._take(">"):
            raise self.error()
        on = self._value()
        off = self._value() if self._take(":") else on
        if off > on:
            raise UsageError(
                f"`gate` {self._text!r}: latent {number} would go off at {off:g}, above the "
                f"{on:g} where it goes on: write the higher value first"
            )
        return Above(int(number), on, off)

    def _value(self) -> float:
        try:
            value = float(self._next())
        except ValueError:
            raise self.error() from None
        if not math.isfinite(value):
            raise self.error()
        return value

    def _next(self) -> str:
        if not self.rest:
            raise self.error()
        return self.rest.pop(0)

    def _take(self, word: str) -> bool:
        if self.rest[:1] != [word]:
            return False
        self.rest.pop(0)
        return True


def _leaves(node: Node) -> list[Above]:
    if isinstance(node, Above):
        return [node]
    parts = (node.part,) if isinstance(node, Not) else node.parts
    return [leaf for part in parts for leaf in _leaves(part)]


@dataclass(eq=False)
class GateState:
    """The state of each condition of a gate after each position, for the rows of one call.

    Column p + 1 holds position p; column 0 is the state before the row begins, off.
    """

    gate: Gate
    _history: list[Bool[Tensor, "rows columns"]] = field(default_factory=list)

    def open(
        self,
        acts: Float[Tensor, "batch seq latents"],
        p: Int[Tensor, "batch seq"],
        real: Bool[Tensor, "batch seq"],
        prompt: Bool[Tensor, "batch seq"],
        prompt_lengths: Int[Tensor, " batch"],
        columns: int,
    ) -> Bool[Tensor, "batch seq"]:
        """Where the gate is open; the states after the pass are stored.

        Args:
            acts: the latents of `gate.ids`, in that order.
            p, real: positions, and which columns are tokens.
            prompt: the tokens that count for a gate on the prompt.
            prompt_lengths: P of each row.
            columns: more than any position of the pass.
        """
        places = {latent: i for i, latent in enumerate(self.gate.ids)}
        if self.gate.on_prompt:
            states = iter([acts[..., places[leaf.latent]] > leaf.on for leaf in self.gate.leaves])
            held = _evaluate(self.gate.root, states) & prompt
            (held_at,) = self._remember([held], p, real, columns)
            decided = held_at.any(dim=1, keepdim=True)
            return decided & (p >= prompt_lengths[:, None] - 1)
        found = []
        remembers = any(leaf.on != leaf.off for leaf in self.gate.leaves)
        for number, leaf in enumerate(self.gate.leaves):
            values = acts[..., places[leaf.latent]]
            on = values > leaf.on
            if leaf.on != leaf.off:
                before = self._before(number, p, real, columns)
                on = _with_memory(on, values <= leaf.off, before, real)
            found.append(on)
        if remembers:
            self._remember(found, p, real, columns)
        return _evaluate(self.gate.root, iter(found))

    def decided(self, batch: int) -> Bool[Tensor, " batch"]:
        """For a gate on the prompt, once the prompt has passed: the rows where it is open."""
        (held_at,) = self._history
        return _wide(held_at, batch, 1).any(dim=1)

    def reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Row i takes over the states of row `rows[i]`."""
        self._history = [
            history.index_select(0, rows.to(history.device)) for history in self._history
        ]

    def _before(
        self,
        number: int,
        p: Int[Tensor, "batch seq"],
        real: Bool[Tensor, "batch seq"],
        columns: int,
    ) -> Bool[Tensor, " batch"]:
        """The state of a condition before the pass's first token of each row."""
        if len(self._history) <= number:
            return torch.zeros(len(p), dtype=torch.bool, device=p.device)
        # A pass that begins with padding begins with the position after it.
        first = torch.where(real[:, 0], p[:, 0], p[:, 0] + 1).clamp(min=0)
        history = _wide(self._history[number].to(p.device), len(p), columns + 1)
        return history.gather(1, first[:, None])[:, 0]

    def _remember(
        self,
        states: list[Bool[Tensor, "batch seq"]],
        p: Int[Tensor, "batch seq"],
        real: Bool[Tensor, "batch seq"],
        columns: int,
    ) -> list[Bool[Tensor, "rows columns"]]:
        """Store the states at the pass's positions; returns the whole histories."""
        batch, width = len(p), columns + 1
        if not self._history:
            empty = torch.zeros((batch, 1), dtype=torch.bool, device=p.device)
            self._history = [empty] * len(states)
        column = torch.where(real, p + 1, 0)
        kept = []
        for history, state in zip(self._history, states, strict=True):
            later = _wide(history.to(p.device), batch, width).scatter(1, column, state & real)
            later[:, 0] = False  # the column that padding is written to
            kept.append(later)
        self._history = kept
        return kept


def _with_memory(
    on: Bool[Tensor, "batch seq"],
    off: Bool[Tensor, "batch seq"],
    before: Bool[Tensor, " batch"],
    real: Bool[Tensor, "batch seq"],
) -> Bool[Tensor, "batch seq"]:
    """The state after each token: set by the last token that switched it, else as before."""
    switched = (on | off) & real
    steps = torch.arange(on.shape[1], device=on.device).expand(on.shape)
    last = torch.where(switched, steps, -1).cummax(dim=1).values
    return torch.where(last >= 0, on.gather(1, last.clamp(min=0)), before[:, None])


def _evaluate(node: Node, states: Iterator[Tensor]) -> Tensor:
    """The expression's value; the leaves' states come in the order written."""
    if isinstance(node, Above):
        return next(states)
    if isinstance(node, Not):
        return ~_evaluate(node.part, states)
    parts = [_evaluate(part, states) for part in node.parts]
    found = parts[0]
    for part in parts[1:]:
        found = found & part if isinstance(node, Every) else found | part
    return found


def _wide(history: Tensor, batch: int, width: int) -> Tensor:
    """`history` of at least `batch` rows and `width` columns, off where it is new."""
    if history.shape[1] < width:
        width += _SPARE_COLUMNS
    return grown(history, batch, width, False)
