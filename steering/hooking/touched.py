"""The report of steering: which positions of which rows were edited, and by how much."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saesteer.checkpoints.shown import Shown, rounded
from saesteer.sae.reports.chart import Chart
from saesteer.sae.reports.svg import Point, curves
from saesteer.steering.hooking.tracking.passes import Call, PassTokens, grown


@dataclass(frozen=True, eq=False)
class TouchedRow:
    """The edited positions of one row of one call."""

    call: int
    """Which call of `generate` (or prompt given to the model directly), from 0."""
    row: int
    """Row of that call's batch; beams and returned sequences have rows of their own."""
    prompt_length: int
    """P: positions from here on are generated tokens."""
    positions: Int[Tensor, " touched"]
    """Ascending."""
    residual_norms: Float[Tensor, " touched"]
    """Length of the residual before the edit."""
    delta_norms: Float[Tensor, " touched"]
    """Length of what was added."""
    gated_off: int = 0
    """Positions in the scope where the gate was closed."""

    @property
    def relative_doses(self) -> Float[Tensor, " touched"]:
        """||delta|| / ||h|| at each position."""
        return self.delta_norms / self.residual_norms

    def before(self, stop: int) -> "TouchedRow":
        """The row without the positions from `stop` on, such as those after an end of text."""
        kept = self.positions < stop
        return dataclasses.replace(
            self,
            positions=self.positions[kept],
            residual_norms=self.residual_norms[kept],
            delta_norms=self.delta_norms[kept],
        )


@dataclass(eq=False, repr=False)
class SteerReport(Shown):
    """What `steer` did so far. A position that is run again (no cache, drafts) counts once.

    A position that several plans or parts edit also counts once, with the norms of the edit that is
    longest relative to its residual.
    """

    passes: int = 0
    """Forward passes of the model inside the context."""
    parts: tuple["SteerReport", ...] = ()
    """One report for each of several plans, in their order; for a single plan, one for each of
    several parts. Parts of a `ByRow` that share a hook share a report."""
    _records: list["Record"] = field(default_factory=list)

    def _facts(self) -> dict[str, Any]:
        return {
            "passes": self.passes,
            "rows": len(self.rows),
            "tokens_touched": self.tokens_touched,
            "relative_dose": rounded(self.relative_dose),
            "parts": len(self.parts) or None,
        }

    @property
    def rows(self) -> list[TouchedRow]:
        """Every row of every call, in order, including rows where nothing was touched."""
        calls = max([len(self._records), *(len(part._records) for part in self._leaves())])
        return [row for call in range(calls) for row in self.call_rows(call)]

    def call_rows(self, call: int) -> list[TouchedRow]:
        """The rows of one call."""
        records = [part._records[call] for part in self._leaves() if call < len(part._records)]
        if not records:
            raise IndexError(f"there was no call {call}")
        return _touched(records)

    def to_frame(self) -> Any:
        """A pandas DataFrame with a row for each edited position: `call`, `row`, `position`,
        `generated` (whether it follows the prompt), `residual_norm`, `delta_norm`,
        `relative_dose`. Needs pandas."""
        import pandas

        rows = [
            {
                "call": row.call,
                "row": row.row,
                "position": position,
                "generated": position >= row.prompt_length,
                "residual_norm": residual,
                "delta_norm": delta,
                "relative_dose": dose,
            }
            for row in self.rows
            for position, residual, delta, dose in zip(
                row.positions.tolist(), row.residual_norms.tolist(), row.delta_norms.tolist(),
                row.relative_doses.tolist(), strict=True,
            )
        ]  # fmt: skip
        columns = ["call", "row", "position", "generated", "residual_norm", "delta_norm",
                   "relative_dose"]  # fmt: skip
        return pandas.DataFrame(rows, columns=columns)

    def plot(self) -> Chart:
        """The relative dose at each edited position, a line a row."""
        points = [
            Point(float(position), float(dose), f"call {row.call}, row {row.row}", f"{dose:.3g}")
            for row in self.rows
            for position, dose in zip(
                row.positions.tolist(), row.relative_doses.tolist(), strict=True
            )
        ]
        title = "Relative dose by position"
        return Chart(curves(points, title, x_label="position"), title)

    @property
    def tokens_touched(self) -> int:
        """Edited positions."""
        return sum(len(row.positions) for row in self.rows)

    @property
    def tokens_gated_off(self) -> int:
        """Positions in a scope where every plan's gate was closed."""
        return sum(row.gated_off for row in self.rows)

    @property
    def relative_dose(self) -> float | None:
        """Median of ||delta|| / ||h|| over the edited positions; None when there are none."""
        return median(row.relative_doses for row in self.rows)

    @property
    def residual_norm(self) -> float | None:
        """Median of ||h|| over the edited positions."""
        return median(row.residual_norms for row in self.rows)

    @property
    def delta_norm(self) -> float | None:
        """Median of ||delta|| over the edited positions."""
        return median(row.delta_norms for row in self.rows)

    def _leaves(self) -> list["SteerReport"]:
        return [leaf for part in self.parts for leaf in part._leaves()] if self.parts else [self]


# At most this many columns of passes after the prompts wait to be written into the record.
_LOGGED_COLUMNS = 1024


@dataclass(frozen=True, eq=False)
class _Logged:
    """What a pass did whose positions all lie after their prompts and are covered."""

    after: int
    touched: Bool[Tensor, "batch seq"] | None
    """None: everywhere."""
    residual: Float[Tensor, "batch seq"]
    delta: Float[Tensor, "#batch #seq"]


@dataclass(eq=False)
class Record:
    """Norms by row and position of one call; NaN where nothing was touched.

    Column p + 1 holds position p. Padding is written to column 0, so that writing need not read the
    mask. `residual` is also recorded where a closed gate prevented the edit.
    """

    call: Call
    residual: Float[Tensor, "batch columns"]
    delta: Float[Tensor, "batch columns"]
    _log: list[_Logged] = field(default_factory=list)
    _logged: int = 0

    @classmethod
    def empty(cls, call: Call, device: torch.device) -> "Record":
        """A record in which no position is touched."""
        nothing = torch.full((call.rows, 1), torch.nan, device=device)
        return cls(call, nothing, nothing)

    def log(
        self,
        after: int,
        touched: Bool[Tensor, "batch seq"] | None,
        residual: Float[Tensor, "batch seq"],
        delta: Float[Tensor, "#batch #seq"],
    ) -> None:
        """Log a pass whose positions all lie after their prompts and are covered.

        It is put in place later, by `settle`, together with the passes that follow it.
        """
        self._log.append(_Logged(after, touched, residual, delta))
        self._logged += residual.shape[1]
        if self._logged >= _LOGGED_COLUMNS:
            self.settle()

    def settle(self) -> None:
        """Put logged passes in place; consecutive ones are written together."""
        entries, self._log, self._logged = self._log, [], 0
        first = 0
        for i in range(1, len(entries) + 1):
            last = entries[i - 1]
            if i < len(entries):
                follows = entries[i].after == last.after + last.residual.shape[1]
                if follows and len(entries[i].residual) == len(last.residual):
                    continue
            self._put(entries[first:i])
            first = i

    def _put(self, entries: Sequence[_Logged]) -> None:
        residual = torch.cat([entry.residual for entry in entries], dim=1)
        delta = torch.cat([entry.delta.expand_as(entry.residual) for entry in entries], dim=1)
        if any(entry.touched is not None for entry in entries):
            everywhere = torch.ones_like(residual, dtype=torch.bool)
            parts = everywhere.split([entry.residual.shape[1] for entry in entries], dim=1)
            touched = torch.cat(
                [
                    part if entry.touched is None else entry.touched
                    for part, entry in zip(parts, entries, strict=True)
                ],
                dim=1,
            )
            delta = delta.masked_fill(~touched, torch.nan)
        batch, count = residual.shape
        after = entries[0].after
        column = self.call.positions_after(batch, after, count, residual.device) + 1
        self._scatter(column, self.call.width + after + count + 1, residual, delta)

    def write(
        self,
        tokens: PassTokens,
        covered: Bool[Tensor, "batch seq"],
        touched: Bool[Tensor, "batch seq"],
        residual: Float[Tensor, "batch seq"],
        delta: Float[Tensor, "#batch #seq"],
    ) -> None:
        """Put in place what a pass did, whatever its positions."""
        self.settle()
        column = torch.where(tokens.real, tokens.p + 1, 0).to(residual.device)
        # Uncovered positions are written too, because another beam may have been recorded there.
        nothing = torch.nan
        self._scatter(
            column,
            tokens.columns + 1,
            residual.masked_fill(~covered, nothing),
            torch.where(touched, delta, nothing),
        )

    def _scatter(
        self,
        column: Int[Tensor, "batch seq"],
        width: int,
        residual: Float[Tensor, "batch seq"],
        delta: Float[Tensor, "batch seq"],
    ) -> None:
        batch = len(residual)
        self.residual = grown(self.residual, batch, width, torch.nan).scatter(1, column, residual)
        self.delta = grown(self.delta, batch, width, torch.nan).scatter(1, column, delta)

    def reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Row i takes over what row `rows[i]` recorded, as beams do."""
        self.settle()
        if len(rows) == len(self.residual):
            rows = rows.to(self.residual.device)
            self.residual = self.residual.index_select(0, rows)
            self.delta = self.delta.index_select(0, rows)


def median(parts: Iterable[Tensor]) -> float | None:
    """The median over all values of several tensors; None when there are none."""
    values = [part.double().numpy() for part in parts]
    joined = np.concatenate(values) if values else np.empty(0)
    return float(np.median(joined)) if joined.size else None


def _touched(records: Sequence[Record]) -> list[TouchedRow]:
    """The rows of one call, merged over the records of one or more parts."""
    call = records[0].call
    for record in records:
        record.settle()
    batch = max(len(record.residual) for record in records)
    width = max(record.residual.shape[1] for record in records)
    residual = torch.full((batch, width - 1), torch.nan)
    delta = residual.clone()
    for record in records:
        theirs = grown(record.residual.cpu(), batch, width, torch.nan)[:, 1:]
        moved = grown(record.delta.cpu(), batch, width, torch.nan)[:, 1:]
        longer = ~moved.isnan() & (delta.isnan() | (moved * residual > delta * theirs))
        residual = torch.where(longer | residual.isnan(), theirs, residual)
        delta = torch.where(longer, moved, delta)
    factor = call.factor(batch)
    rows = []
    for i, norms in enumerate(delta):
        at = torch.nonzero(~norms.isnan()).flatten()
        closed = int((norms.isnan() & ~residual[i].isnan()).sum())
        length = call.prompt_lengths[i // factor]
        rows.append(TouchedRow(call.number, i, length, at, residual[i, at], norms[at], closed))
    return rows
