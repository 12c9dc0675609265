"""A call of the model and its forward passes: which rows there are, where their tokens lie, and
what the arguments of a pass say about that."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.places import Place
from saesteer.sae.text.prompts import EncodedPrompt


@dataclass(frozen=True, eq=False)
class PlainRows:
    """Residuals of the unsteered model at some positions of each row's prompt, in float32."""

    first: Int[Tensor, " rows"]
    """The position of the first one kept."""
    states: Tensor
    """`[rows, positions, d_model]`."""

    def at(self, spans: Sequence[tuple[int, int]]) -> Float[Tensor, "rows d_model"]:
        """The residual at the first position of one span for each row."""
        starts = torch.tensor([start for start, _ in spans], device=self.first.device)
        rows = torch.arange(len(self.states), device=self.states.device)
        return self.states[rows, (starts - self.first).to(self.states.device)]


@dataclass(eq=False)
class Call:
    """One batch of prompts: a call of `generate`, or a row given to the model directly."""

    number: int
    prompt_lengths: list[int]
    """P of each row, in real tokens."""
    prompts: list[EncodedPrompt | None]
    real: Bool[Tensor, "rows width"]
    """Which columns of the prompt hold tokens and not padding."""
    ids: Int[Tensor, "rows width"] | None
    generating: bool
    first_pass: int = 0
    """Number of the first forward pass that belongs to the call, from 1."""
    embeds: Tensor | None = None
    """What the call began with in place of `ids`."""
    plain: dict[Place, PlainRows] = field(default_factory=dict)
    """What edits asked for of the unsteered model, by hook point."""
    _ends: dict[tuple[int, torch.device], Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of prompts."""
        return len(self.prompt_lengths)

    @property
    def width(self) -> int:
        """Columns that the rows began with, padding included."""
        return self.real.shape[1]

    @cached_property
    def lengths(self) -> list[int]:
        """Real tokens that each row began with: the position of the first column after them."""
        found: list[int] = self.real.sum(dim=1).tolist()
        return found

    @cached_property
    def ends_without_padding(self) -> bool:
        """Whether the last column that the rows began with is a token in each of them."""
        return bool(self.real[:, -1:].all())

    def factor(self, batch: int) -> int:
        """How many rows of a pass belong to each prompt: beams, returned sequences."""
        if batch % self.rows:
            raise UserError(
                f"a forward pass has {batch} rows and the call began with {self.rows} prompts: "
                "steering cannot tell which row belongs to which prompt"
            )
        return batch // self.rows

    def positions_after(
        self, batch: int, start: int, count: int, device: torch.device
    ) -> Int[Tensor, "batch count"]:
        """Positions of `count` columns from the `start`-th after the prompts on."""
        key = batch, device
        if key not in self._ends:
            with torch.inference_mode(False):
                ends = torch.tensor(self.lengths, dtype=torch.int64, device=device)
                self._ends[key] = ends.repeat_interleave(self.factor(batch))[:, None]
        steps = torch.arange(start, start + count, device=device)
        return self._ends[key] + steps


@dataclass(eq=False)
class PassTokens:
    """The tokens of one forward pass."""

    call: Call
    batch: int
    length: int
    columns: int
    """Width of the rows so far, earlier tokens and padding included."""
    device: torch.device
    ids: Int[Tensor, "batch seq"] | None
    """Token ids, where the pass was given ids and not embeddings."""
    real_columns: Bool[Tensor, "batch columns"] | None
    """Which columns hold tokens; None after the prompts of `generate`, where all do."""

    @property
    def after(self) -> int | None:
        """How many columns after the prompts the pass begins, the same in all of its rows.

        None when the pass holds a part of the prompts, or is not one of `generate` with a cache.
        """
        if self.real_columns is not None:
            return None
        return self.columns - self.length - self.call.width

    @cached_property
    def p(self) -> Int[Tensor, "batch seq"]:
        """Position of each token among the real tokens of its row."""
        after = self.after
        if after is not None:
            return self.call.positions_after(self.batch, after, self.length, self.device)
        assert self.real_columns is not None
        return (self.real_columns.cumsum(dim=1) - 1)[:, self.columns - self.length :]

    @cached_property
    def real(self) -> Bool[Tensor, "batch seq"]:
        """False for padding, whose `p` means nothing."""
        if self.real_columns is None:
            return torch.ones((self.batch, self.length), dtype=torch.bool, device=self.device)
        return self.real_columns[:, self.columns - self.length :]


def grown(buffer: Tensor, batch: int, width: int, fill: bool | float) -> Tensor:
    """`buffer` `[rows, columns]` of at least `batch` rows and `width` columns.

    Rows are repeated for beams and returned sequences; new columns hold `fill`.
    """
    if len(buffer) < batch:
        buffer = buffer.repeat_interleave(batch // len(buffer), dim=0)
    if buffer.shape[1] < width:
        more = buffer.new_full((len(buffer), width - buffer.shape[1]), fill)
        buffer = torch.cat([buffer, more], dim=1)
    return buffer


_CACHES = ("past_key_values", "cache", "cache_params")
"""What releases of transformers call the cache; `cache` since 5.24."""

_WITHOUT_CACHE = "run it with use_cache=False"


def cache_in(given: Mapping[str, Any]) -> Any:
    """The cache among a pass's arguments or outputs, by its name or by what it can do."""
    named = [given[name] for name in _CACHES if given.get(name) is not None]
    able = [value for value in given.values() if hasattr(value, "get_seq_length")]
    return next(iter(able or named), None)


def past_length(
    cache: Any, name: str, counted: int | None = None, other: Collection[int] = ()
) -> int:
    """Earlier columns that are in the cache and not in this pass; 0 without a cache.

    A state (Mamba) has no length. Nothing can be taken out of one again, so the columns that were
    `counted` while it was filled are what it holds.

    Args:
        other: layers that hold something else than the row.

    Raises:
        UserError: layers of the cache hold unlike numbers of tokens, or it does not say how many.
    """
    if cache is None:
        return 0
    try:
        first = int(cache.get_seq_length())
    except (AttributeError, ValueError) as error:
        if not _is_filled(cache):
            return 0
        if counted is not None:
            return counted
        raise UserError(
            f"the cache of {name} does not say how many tokens it holds, and was filled outside "
            "steer(...), so positions cannot be counted: run the whole row inside it"
        ) from error
    lengths = {first}
    for number, layer in enumerate(getattr(cache, "layers", None) or ()):
        if number in other or not getattr(layer, "is_initialized", False):
            continue
        length = layer.get_seq_length() if hasattr(layer, "get_seq_length") else first
        # Static caches keep theirs on the device: reading it would wait for every layer.
        if not (isinstance(length, Tensor) and length.device.type != "cpu"):
            lengths.add(int(length))
    if len(lengths) > 1:
        raise UserError(
            f"the layers of the cache of {name} hold {', '.join(map(str, sorted(lengths)))} tokens "
            f"of one row, so its positions cannot be told: {_WITHOUT_CACHE}"
        )
    return first


def _is_filled(cache: Any) -> bool:
    """Whether a cache of states has seen any token."""
    filled = getattr(cache, "has_previous_state", True)
    if not callable(filled):
        return bool(filled)
    try:
        return bool(filled())
    except ValueError:
        return bool(getattr(cache, "layers", None))


def check_mask(mask: Any, cache: Any, columns: int, name: str) -> None:
    """Raise UserError for a mask of another width than the tokens so far.

    One for a static cache may be as wide as the cache will be.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] == columns:
        return
    fixed = getattr(cache, "max_cache_len", None) or getattr(cache, "is_compileable", False)
    if mask.shape[1] > columns and fixed:
        return
    raise UserError(
        f"{name} was given an attention mask of {mask.shape[1]} columns for {columns} tokens "
        "(those in the cache and those of this pass), so positions cannot be told: give a mask of "
        "the whole row"
    )


def check_position_ids(given: Any, tokens: PassTokens, name: str) -> None:
    """Raise UserError where position ids contradict the cache and the mask.

    They may count the tokens of the row, or its columns with the padding.
    """
    if not isinstance(given, Tensor) or given.dim() != 2 or given.is_floating_point():
        return
    shape = (tokens.batch, tokens.length)
    if given.shape[1] != tokens.length or given.shape[0] not in (1, tokens.batch):
        return  # the model itself refuses these
    given = given.to(tokens.device).expand(shape)
    columns = torch.arange(tokens.columns - tokens.length, tokens.columns, device=tokens.device)
    real = tokens.real
    wrong = (given != tokens.p) & real
    if not wrong.any() or not ((given != columns) & real).any():
        return
    row, column = torch.nonzero(wrong)[0].tolist()
    raise UserError(
        f"{name} was given position ids that say {int(given[row, column])} of a token that the "
        f"cache and the attention mask put at position {int(tokens.p[row, column])} of its row: "
        "give one row a text, padded, with a mask of the whole row"
    )


def visible_keys(
    mask: Any, batch: int, columns: int, device: torch.device
) -> Bool[Tensor, "batch columns"]:
    """The real columns according to a 4-D attention mask: those that the last query may see."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return torch.ones((batch, columns), dtype=torch.bool, device=device)
    last = mask[:, 0, -1, :columns].to(device)
    # Boolean masks say True, additive ones 0, where attention is allowed.
    return (last if last.dtype == torch.bool else last >= 0).expand(batch, -1)
