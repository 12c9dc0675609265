"""What the parts of a group and the prompts of a call determine for the rows of its passes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saesteer.steering.hooking.scope import NO_END, RowInfo, Rows
from saesteer.steering.hooking.tracking.passes import Call


@dataclass(frozen=True, eq=False)
class CallRows:
    """What parts and prompts determine for the rows of a pass, one entry per row."""

    covered: Rows
    prompt: Rows | None
    """The prompt's own tokens, for gates that are decided on it."""
    prompt_lengths: Int[Tensor, " batch"]
    part_of_row: Int[Tensor, " batch"] | None
    after_prompts: "AfterPrompts"
    opened: Bool[Tensor, " batch"] | None
    """Where the conditions of the plans hold; None without conditions."""


@dataclass(frozen=True)
class AfterPrompts:
    """Which columns after the prompts the scopes cover, as Python numbers.

    Numbers on the host, because reading a tensor would wait for its device. Column n after a prompt
    has position length + n in its row, and a scope is an interval of positions that begins in the
    prompt.
    """

    none_from: int
    """From this column on, no row is covered."""
    all_until: int
    """Before this column, every row is covered."""

    @classmethod
    def of(cls, call: Call, covered: Sequence[RowInfo]) -> "AfterPrompts":
        """For the rows of a call and the positions that each one's scope covers."""
        ends = call.lengths
        pairs = list(zip(covered, ends, strict=True))
        none_from = max(row.stop - end for row, end in pairs)
        exact = call.prompt_lengths == ends and all(
            not row.excluded or row.excluded[-1] < end for row, end in pairs
        )
        if not exact or any(row.start > end for row, end in pairs):
            return cls(NO_END, 0)
        return cls(none_from, min(row.stop - end for row, end in pairs))


def last_of_prompts(call: Call) -> list[tuple[int, int]]:
    """The position of each prompt's last token, as a span."""
    return [(length - 1, length) for length in call.prompt_lengths]


def expanded(values: Sequence[int], factor: int, device: torch.device) -> Int[Tensor, " batch"]:
    """One number per row of a pass: that of each prompt, `factor` times."""
    return torch.tensor(list(values), dtype=torch.int64, device=device).repeat_interleave(factor)
