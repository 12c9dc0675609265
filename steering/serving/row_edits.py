"""Steering hooks for a batch whose rows begin, end and are steered each in its own way.

Every row has the hooks that `steer` would make for it alone, with a tracker of its own, so scopes,
gates, conditions and schedules mean what they mean there. In a pass over one token of each row most
edits need nothing but the residual: those of all rows that add a vector, and those of rows with the
same part of a plan, are made together.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesteer.sae.model.hooks import HookPoint, hooked
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import EncodedPrompt
from saesteer.steering.hooking.arrangement import arrange
from saesteer.steering.hooking.edits import AddEdit, EditPositions
from saesteer.steering.hooking.group_hook import GroupHook
from saesteer.steering.hooking.latent_values import LatentReader, SAEs
from saesteer.steering.hooking.scope_arguments import ScopeArguments
from saesteer.steering.hooking.touched import SteerReport, TouchedRow
from saesteer.steering.hooking.tracking.passes import Call, PassTokens
from saesteer.steering.hooking.tracking.plain_pass import PlainWanted, in_plain_pass, read_plain
from saesteer.steering.plans.part import PlanPart
from saesteer.steering.plans.plan import Plan

_EDITS_KEPT = 64

Place = tuple[int, str]
"""A module, by its id, and its side."""


@dataclass(eq=False)
class RowTracker:
    """Where the tokens of one row lie in the present pass. The row is a call of its own."""

    passes: int = 0
    calls: list[Call] = field(default_factory=list)
    on_reorder: list[Callable[[Tensor], None]] = field(default_factory=list)
    plain_wanted: list[PlainWanted] = field(default_factory=list)
    current: PassTokens | None = None


@dataclass(frozen=True, eq=False)
class _RowPart:
    part: PlanPart
    hook: GroupHook


class RowEdits:
    """The edits of one row."""

    def __init__(
        self,
        lm: LanguageModel,
        plans: Sequence[Plan],
        prompt: EncodedPrompt,
        saes: SAEs,
        force: bool,
    ) -> None:
        """Raises what `steer` raises for these plans and this prompt."""
        self._lm = lm
        self._tracker = RowTracker()
        known = prompt if prompt.offsets else None  # a prompt of token ids has no text
        arguments = ScopeArguments(None if known is None else [known], None, False, False, False)
        leaves = []
        self.parts: dict[Place, list[_RowPart]] = {}
        for entry in arrange(list(plans), {}):
            for group in entry.groups:
                if group.is_off:
                    continue
                report = SteerReport()
                leaves.append(report)
                hook = GroupHook(lm, group, arguments, self._tracker, report, saes, force)
                place = place_of(hook.point)
                self.parts.setdefault(place, []).append(_RowPart(group.parts[0], hook))
        self._report = SteerReport(parts=tuple(leaves))
        ids = torch.tensor([prompt.token_ids], device=lm.device)
        real = torch.ones_like(ids, dtype=torch.bool)
        call = Call(0, [len(prompt)], [known], real, ids, generating=True, first_pass=1)
        self._tracker.calls.append(call)

    @property
    def has_run(self) -> bool:
        """Whether any hook has seen the row."""
        return self._tracker.passes > 0 and bool(self._report.parts)

    @property
    def points(self) -> list[HookPoint]:
        """Where it edits."""
        return [parts[0].hook.point for parts in self.parts.values()]

    @property
    def tokens(self) -> PassTokens | None:
        """The row's tokens in the present pass."""
        return self._tracker.current

    def begin_pass(self, ids: Int[Tensor, "one count"], past: int) -> None:
        """A pass over the next tokens of the row, after `past` earlier ones, begins.

        Before the first one the prompt runs unsteered, where an edit asks for that. Raises what the
        scopes raise for the prompt.
        """
        (call,) = self._tracker.calls
        self._tracker.passes += 1
        count = ids.shape[1]
        real = None if past else torch.ones_like(ids, dtype=torch.bool)
        tokens = PassTokens(call, 1, count, past + count, ids.device, ids, real)
        self._tracker.current = tokens
        if past:
            return
        if self._tracker.plain_wanted:
            call.plain = read_plain(self._lm, call, self._tracker.plain_wanted, {})
        for parts in self.parts.values():
            for one in parts:
                one.hook.prepare(tokens)

    def end_pass(self) -> None:
        """The pass is over."""
        self._tracker.current = None

    def touched(self, stop: int) -> tuple[TouchedRow, int]:
        """The edited positions before `stop`, and how many a closed gate left alone."""
        try:
            (row,) = self._report.call_rows(0)
        except IndexError:  # no hook was reached
            nothing = torch.empty(0)
            return TouchedRow(0, 0, 0, nothing.long(), nothing, nothing), 0
        return row.before(stop), row.gated_off


def place_of(point: HookPoint) -> Place:
    """The module and side of a hook point; names of one place may differ."""
    return id(point.module), point.side


@dataclass(frozen=True, eq=False)
class Watch:
    """Latents of an SAE that are read in every pass of a row, after the edits."""

    point: HookPoint
    reader: LatentReader
    seen: list[Float[Tensor, "tokens latents"]] = field(default_factory=list)
    """One for each pass."""


@dataclass(frozen=True, eq=False)
class RowInPass:
    """A row that is edited or read in a pass."""

    number: int
    """Its place in the batch."""
    count: int
    """How many of the last columns are its tokens."""
    edits: RowEdits | None
    watch: Watch | None

    def parts(self, place: Place) -> list[_RowPart]:
        """The parts that edit the row at one place."""
        return [] if self.edits is None else self.edits.parts.get(place, [])


class BatchHooks:
    """The hooks on the model: one for each place where any row is edited or read.

    They stay until `close`; a pass in which nothing happens there costs a look-up.
    """

    def __init__(self) -> None:
        self._rows: Sequence[RowInPass] = ()
        self._columns = 0
        self._stack = contextlib.ExitStack()
        self._known: set[Place] = set()
        self._adding: dict[tuple[int, ...], tuple[Sequence[PlanPart], AddEdit]] = {}

    def watch(self, points: Iterable[HookPoint]) -> None:
        """Make the hooks at these points, where there are none."""
        for point in points:
            place = place_of(point)
            if place not in self._known:
                self._known.add(place)
                self._stack.enter_context(hooked(point, self._at(place)))

    def close(self) -> None:
        """Take all hooks off the model."""
        self._stack.close()
        self._known.clear()

    @contextlib.contextmanager
    def a_pass(self, rows: Sequence[RowInPass], columns: int) -> Iterator[None]:
        """A pass over `columns` columns, in which every row ends in the last one."""
        self._rows, self._columns = rows, columns
        try:
            yield
        finally:
            self._rows = ()
            for row in rows:
                if row.edits is not None:
                    row.edits.end_pass()

    def _at(self, place: Place) -> Callable[[Tensor], Tensor | None]:
        def at_place(h: Float[Tensor, "rows columns d_model"]) -> Tensor | None:
            if in_plain_pass() or not self._rows:
                return None
            edited = [row for row in self._rows if row.parts(place)]
            out = None
            if edited:
                if h.shape[1] != self._columns:
                    edited[0].parts(place)[0].hook(h)  # says what is wrong with the place
                out = h.clone()
                if self._columns == 1:
                    self._edit_one_token(out, place, edited)
                else:
                    self._edit_row_by_row(out, place, edited)
            for row in self._rows:
                if row.watch is not None and place_of(row.watch.point) == place:
                    states = (h if out is None else out)[row.number, -row.count :]
                    row.watch.seen.append(row.watch.reader.read(states.float()))
            return out

        return at_place

    def _edit_row_by_row(
        self,
        out: Float[Tensor, "rows columns d_model"],
        place: Place,
        edited: Sequence[RowInPass],
    ) -> None:
        for row in edited:
            piece = out[row.number : row.number + 1, -row.count :]
            for part in row.parts(place):
                new = part.hook(piece)
                piece = piece if new is None else new
            out[row.number, -row.count :] = piece[0]

    def _edit_one_token(
        self, out: Float[Tensor, "rows one d_model"], place: Place, edited: Sequence[RowInPass]
    ) -> None:
        """The pass over one token of each row: all first parts, then all second ones."""
        for turn in range(max(len(row.parts(place)) for row in edited)):
            alike: dict[Any, list[tuple[int, PassTokens, _RowPart, float]]] = {}
            for row in edited:
                if turn >= len(row.parts(place)):
                    continue
                one = row.parts(place)[turn]
                tokens = None if row.edits is None else row.edits.tokens
                assert tokens is not None
                share = one.hook.share_after_prompts(tokens)
                if share is None:
                    new = one.hook(out[row.number : row.number + 1])
                    if new is not None:
                        out[row.number] = new[0]
                elif share != 0:
                    members = alike.setdefault(_kind(one.part), [])
                    members.append((row.number, tokens, one, share))
            for members in alike.values():
                self._edit_together(out, members)

    def _edit_together(
        self,
        out: Float[Tensor, "rows one d_model"],
        members: Sequence[tuple[int, PassTokens, _RowPart, float]],
    ) -> None:
        """Make the edits of rows whose parts are alike, in place."""
        rows = torch.tensor([row for row, *_ in members], device=out.device)
        before = out[rows]
        wide = before.float()
        weight = torch.tensor([[share] for *_, share in members], device=out.device)
        first = members[0][2]
        if first.part.does.sums:
            parts = [one.part for _, _, one, _ in members]
            distinct = list({id(part): part for part in parts}.values())
            places = {id(part): place for place, part in enumerate(distinct)}
            edit = self._edit_of(distinct)
            which = torch.tensor([places[id(part)] for part in parts], device=out.device)
            delta = edit.delta(wide, EditPositions(None, weight, which))
        else:
            delta = first.hook.delta_after_prompts(wide, weight)
        out[rows] = (wide + delta).to(out.dtype)
        norms, deltas = wide.norm(dim=-1), delta.norm(dim=-1).expand(len(members), 1)
        for place, (_, tokens, one, _) in enumerate(members):
            one.hook.log_after_prompts(tokens, norms[place : place + 1], deltas[place : place + 1])

    def _edit_of(self, parts: Sequence[PlanPart]) -> AddEdit:
        """The edit of several parts that add a vector in the same way, kept between passes."""
        key = tuple(id(part) for part in parts)  # the parts are kept too, so ids stay theirs
        if key not in self._adding:
            if len(self._adding) >= _EDITS_KEPT:
                self._adding.clear()
            self._adding[key] = parts, AddEdit(parts)
        return self._adding[key][1]


def _kind(part: PlanPart) -> tuple[Any, ...]:
    """What parts must have in common to edit together after the prompts."""
    if part.does.sums:
        return part.method, part.unit == "rel", part.sae.normalize_activations
    return ("the same part", id(part))
