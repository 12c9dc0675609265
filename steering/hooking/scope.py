"""Which token positions are steered.

A position `p` counts the real tokens of a row from its start: padding has none. `P` is the length
of the row's prompt, so `p = P - 1` is the position whose logits give the first generated token.
Every scope is one interval of positions per row, less the positions that are left out.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError, none_of
from saesteer.sae.text.prompts import EncodedPrompt
from saesteer.steering.hooking.chats import EncodedChat, header_start

SCOPES = (
    "generation",
    "generated",
    "prompt",
    "all",
    "last-prompt",
    "first:N",
    "span:A-B",
    "after-instruction",
    "assistant",
    "tail",
    "replies",
)

IN_PROMPT = ("prompt", "last-prompt", "span", "tail")
"""The kinds of scope that end with the prompt."""

NO_END = 2**62
"""The `stop` of a scope without an end; no position is that large."""


@dataclass(frozen=True)
class Scope:
    """A parsed scope; made by `parse_scope`."""

    kind: str
    """The word before the colon."""
    first: int = 0
    """N of `first:N`, A of `span:A-B`."""
    last: int = 0
    """B of `span:A-B`."""
    instructions: tuple[str, ...] = ()
    """The wordings of the instruction, of which every prompt holds one, for `after-instruction`."""
    include_first: bool = False
    """`prompt` and `all` keep position 0."""
    include_template: bool = False
    """`prompt`, `all` and `assistant` keep template tokens and special tokens."""
    exclude_special: bool = False
    """Special tokens are left out, whatever the kind."""
    reply_header: str = ""
    """What the chat template writes before a reply, for `assistant`."""
    tail: tuple[int, ...] = ()
    """The tokens that the template writes after the user's text, for `tail` without prompts."""

    def __str__(self) -> str:
        if self.kind == "first":
            return f"first:{self.first}"
        return f"span:{self.first}-{self.last}" if self.kind == "span" else self.kind

    @property
    def needs_prompts(self) -> bool:
        """Whether positions depend on the prompt's text, not only on its length.

        A tail can also be told by the template alone.
        """
        return self.kind in ("span", "after-instruction", "assistant")

    @property
    def leaves_out_special(self) -> bool:
        """Whether special tokens are left out, except position 0 with `include_first`."""
        if self.exclude_special:
            return True
        return self.kind in ("prompt", "all") and not self.include_template

    def row(self, prompt_length: int, prompt: EncodedPrompt | None = None) -> "RowInfo":
        """The positions of a row whose prompt has `prompt_length` real tokens.

        `prompt` tells the user's text from the template; without it no template token is left out.
        Raises UsageError when the scope needs `prompt` and it is None, UserError when the prompt
        has no token in the span, or holds none of the instructions.
        """
        start, stop = self._interval(prompt_length, prompt)
        excluded: set[int] = set()
        if self.kind == "assistant":
            assert prompt is not None  # else _interval has raised
            excluded.update(self._not_assistant(prompt, start))
        if self.kind in ("prompt", "all"):
            if prompt is not None and not self.include_template:
                excluded.update(torch.nonzero(prompt.template_mask).flatten().tolist())
            if self.include_first:
                excluded.discard(0)
            else:
                excluded.add(0)
        return RowInfo(start, stop, tuple(sorted(excluded)))

    def _interval(self, length: int, prompt: EncodedPrompt | None) -> tuple[int, int]:
        match self.kind:
            case "generation":
                return max(length - 1, 0), NO_END
            case "generated":
                return length, NO_END
            case "prompt":
                return 0, length
            case "all":
                return 0, NO_END
            case "last-prompt":
                return max(length - 1, 0), length
            case "first":
                return max(length - 1, 0), max(length - 1, 0) + self.first
            case "tail":
                return self._tail_of(length, prompt)
        assert self.needs_prompts, self.kind
        if prompt is None:
            raise UsageError(
                f"`scope` {self} depends on the text of the prompts: give them (prompts=...), or "
                "use generation, generated, prompt, all, last-prompt or first:N"
            )
        if self.kind == "span":
            characters = len(prompt.text)
            if self.first >= characters:
                raise UserError(
                    f"`scope` {self} begins after the end of a prompt of {characters} characters "
                    f"({_shorten(prompt.text)!r}): characters are counted from 0 in the prompt's "
                    "own text"
                )
            return prompt.token_span(self.first, min(self.last, characters))
        if self.kind == "assistant":
            begin = header_start(prompt, self.reply_header)
            replies = prompt.replies if isinstance(prompt, EncodedChat) else ()
            earlier = [first - 1 for first, _ in replies[:1]]
            if self.include_template:
                header = len(prompt) - begin
                return min([begin, *(first - header for first, _ in replies[:1])]), NO_END
            return min([max(length - 1, 0), *earlier]), NO_END
        # A prompt that ends with its instruction has nothing after it: the edit then begins where
        # the first generated token is predicted, like the other scopes that reach into generation.
        return min(_instruction_end(prompt, self.instructions), max(length - 1, 0)), NO_END

    def _tail_of(self, length: int, prompt: EncodedPrompt | None) -> tuple[int, int]:
        """What follows the user's text in the prompt."""
        if prompt is not None:
            start = prompt.user_span[1]
            if start < len(prompt):
                return start, len(prompt)
            raise UserError(
                f"`scope` tail: nothing follows the text of the prompt {_shorten(prompt.text)!r}: "
                "send it through the chat template, or use last-prompt"
            )
        if not self.tail:
            raise UsageError(
                "`scope` tail is what the chat template writes after the user's text: give the "
                "prompts (prompts=...), or use last-prompt"
            )
        return max(length - len(self.tail), 0), length

    def _not_assistant(self, prompt: EncodedPrompt, start: int) -> set[int]:
        """Positions of the prompt from `start` on that are in no turn of the assistant.

        A turn reaches from the token whose logits give its first token to its last token; with
        `include_template`, from its header to the token after it, which ends the turn.
        """
        begin = header_start(prompt, self.reply_header)
        header = len(prompt) - begin
        inside = set(range(begin if self.include_template else len(prompt) - 1, len(prompt)))
        for first, end in prompt.replies if isinstance(prompt, EncodedChat) else ():
            wide = self.include_template
            inside.update(range(first - (header if wide else 1), end + (1 if wide else 0)))
        return set(range(start, len(prompt))) - inside


@dataclass(frozen=True)
class RowInfo:
    """The positions of one row that a scope covers: `start <= p < stop`, less `excluded`."""

    start: int
    stop: int
    excluded: tuple[int, ...] = ()


NOWHERE = RowInfo(0, 0)
"""A row without covered positions."""


def parse_scope(
    text: str,
    *,
    instructions: Sequence[str] = (),
    include_first: bool = False,
    include_template: bool = False,
    exclude_special: bool = False,
) -> Scope:
    """Parse a scope; the other arguments are fields of `Scope`.

    `generation` (p >= P-1), `generated` (p >= P), `prompt` (p < P), `all`, `last-prompt`
    (p = P-1), `first:N` (P-1 <= p < P-1+N), `span:A-B` (tokens that overlap characters [A, B) of
    the prompt), `after-instruction` (from the end of the instruction on), `assistant` (every turn
    of the assistant, from the token whose logits give its first token on; in a prompt of one turn
    of the user that is `generation`), `tail` (what the chat template writes after the last text of
    the user), `replies` (another name of `generated`).

    Raises UsageError, which lists what is allowed, for anything else.
    """
    word = text.strip()
    rest: dict[str, Any] = {
        "instructions": tuple(instructions),
        "include_first": include_first,
        "include_template": include_template,
        "exclude_special": exclude_special,
    }
    if word in SCOPES and ":" not in word:
        return Scope("generated" if word == "replies" else word, **rest)
    if found := re.fullmatch(r"first:(\d+)", word):
        if int(found[1]) > 0:
            return Scope("first", int(found[1]), **rest)
        raise UsageError(f"`scope` {word}: N must be at least 1 token")
    if found := re.fullmatch(r"span:(\d+)-(\d+)", word):
        if int(found[1]) < int(found[2]):
            return Scope("span", int(found[1]), int(found[2]), **rest)
        raise UsageError(
            f"`scope` {word}: A must be less than B (characters A to B of the prompt, B not in it)"
        )
    raise none_of("`scope`", SCOPES, text)


@dataclass(frozen=True)
class Rows:
    """The `RowInfo` of a batch as tensors, one line per row."""

    start: Int[Tensor, " batch"]
    stop: Int[Tensor, " batch"]
    excluded: Bool[Tensor, "batch width"]

    @classmethod
    def stack(cls, rows: Sequence[RowInfo], device: torch.device | str = "cpu") -> "Rows":
        """Put rows on a device; `excluded` is as wide as the last excluded position."""
        width = max((row.excluded[-1] + 1 for row in rows if row.excluded), default=0)
        excluded = torch.zeros((len(rows), width), dtype=torch.bool)
        for i, row in enumerate(rows):
            excluded[i, list(row.excluded)] = True
        return cls(
            torch.tensor([row.start for row in rows], dtype=torch.int64).to(device),
            torch.tensor([row.stop for row in rows], dtype=torch.int64).to(device),
            excluded.to(device),
        )

    def expand(self, factor: int) -> "Rows":
        """Every row `factor` times, as beams and returned sequences are laid out."""
        if factor == 1:
            return self
        return Rows(
            self.start.repeat_interleave(factor, dim=0),
            self.stop.repeat_interleave(factor, dim=0),
            self.excluded.repeat_interleave(factor, dim=0),
        )

    def mask(
        self, p: Int[Tensor, "batch seq"], real: Bool[Tensor, "batch seq"] | None = None
    ) -> Bool[Tensor, "batch seq"]:
        """True where the token at position `p` is covered. Negative `p`, and padding, never is."""
        inside = (p >= 0) & (p >= self.start[:, None]) & (p < self.stop[:, None])
        if real is not None:
            inside = inside & real
        width = self.excluded.shape[1]
        if width:
            out = self.excluded.gather(1, p.clamp(0, width - 1)) & (p < width)
            inside = inside & ~out
        return inside


def _instruction_end(prompt: EncodedPrompt, instructions: Sequence[str]) -> int:
    """The first token after the instruction that ends last in the prompt."""
    wanted = [text.strip() for text in instructions if text.strip()]
    if not wanted:
        raise UsageError(
            "`scope` after-instruction needs the texts of the instruction: use a plan that rank "
            "made, or another `scope`"
        )
    places = [(prompt.text.rfind(text), len(text)) for text in wanted]
    ends = [(at + length, at) for at, length in places if at >= 0]
    if not ends:
        raise UserError(
            f"`scope` after-instruction: the prompt {_shorten(prompt.text)!r} holds none of the "
            f"{len(wanted)} wordings of the instruction (the first is {_shorten(wanted[0])!r}): "
            "put the instruction into the prompt or use another scope"
        )
    end, at = max(ends)
    return prompt.token_span(at, end)[1]


def _shorten(text: str, limit: int = 60) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
