"""One hook on the residual stream, which applies the edit of one group of parts."""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.sae.model.hooks import HookPoint, resolve_site
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.hooking.arrangement import Group
from saesteer.steering.hooking.call_rows import AfterPrompts, CallRows, expanded, last_of_prompts
from saesteer.steering.hooking.chats import check_tail
from saesteer.steering.hooking.edits import EditPositions, make_edit
from saesteer.steering.hooking.gates import GateState
from saesteer.steering.hooking.latent_values import (
    SAEs,
    gate_reader,
    given_sae,
    matching_sae,
    needs_sae,
)
from saesteer.steering.hooking.scope import NOWHERE, RowInfo, Rows, parse_scope
from saesteer.steering.hooking.scope_arguments import ScopeArguments
from saesteer.steering.hooking.touched import Record, SteerReport
from saesteer.steering.hooking.tracking.passes import Call, PassTokens
from saesteer.steering.hooking.tracking.plain_pass import PlainWanted, plain_at
from saesteer.steering.plans.schedules import parse_schedule


@runtime_checkable
class Tracker(Protocol):
    """What tells a hook where the tokens of the present pass lie."""

    passes: int
    calls: list[Call]
    on_reorder: list[Callable[[Tensor], None]]
    plain_wanted: list[PlainWanted]

    @property
    def current(self) -> PassTokens | None:
        """The tokens of the pass; None where nothing is to be edited."""


class GroupHook:
    """Applies the edit of one group of parts at its hook point, and records what it changed."""

    def __init__(
        self,
        lm: LanguageModel,
        group: Group,
        arguments: ScopeArguments,
        tracker: Tracker,
        report: SteerReport,
        saes: SAEs,
        force: bool,
    ) -> None:
        first = group.parts[0]
        self.point: HookPoint = resolve_site(lm, first.layer, first.site)
        self._group, self._tracker, self._report = group, tracker, report
        self._scopes = [
            arguments.resolve(lm, part.scope, task)
            for part, task in zip(group.parts, group.tasks, strict=True)
        ]
        self._schedule = parse_schedule(first.schedule)
        self._d_model = lm.d_model
        sae = given_sae(first, saes)
        if sae is None and needs_sae(first):
            saes = sae = matching_sae(first, None, force)
        self._edit = make_edit(group.parts, saes, force)
        self._gate = first.parsed_gate if first.gate else None
        if self._gate is not None:
            if sae is not None:
                sae = matching_sae(first, sae, force)
            self._gate_reader = gate_reader(first, sae)
            self._gate_prompt = parse_scope("prompt") if self._gate.on_prompt else None
            self._states: dict[int, GateState] = {}
        leaves_out = [scope.leaves_out_special for scope in self._scopes]
        self._special = lm.special_ids if any(leaves_out) else None
        self._all_leave_out = all(leaves_out)
        if first.does.from_plain:
            tracker.plain_wanted.append(PlainWanted(self.point, self._spans))
        self._conditions = {
            condition: resolve_site(lm, condition.layer, condition.site)
            for condition in group.conditions
            if condition is not None
        }
        for point in self._conditions.values():
            tracker.plain_wanted.append(PlainWanted(point, last_of_prompts))
        self._rows: dict[int, CallRows] = {}
        self._rows_call: Call | None = None
        tracker.on_reorder.append(self._reorder)

    def __call__(self, h: Tensor) -> Tensor | None:
        tokens = self._tracker.current
        if tokens is None:
            return None  # a block that is run on its own belongs to no row
        self._report.passes = self._tracker.passes
        if h.shape != (tokens.batch, tokens.length, self._d_model):
            carries = (
                f"`site` {self.point.site} ({self.point.module_path}) carries a tensor of shape "
                f"{list(h.shape)}, not [{tokens.batch}, {tokens.length}, {self._d_model}] (rows, "
                "tokens, width)"
            )
            if self.point.site in ("resid_post", "resid_pre"):
                raise UserError(
                    f"{carries}: the blocks of this model carry several streams, or other rows, "
                    "and cannot be steered there; a module path inside a block may be (`site`)"
                )
            raise UserError(f"{carries}: choose a site on the residual stream, such as resid_post")
        rows = self._call_rows(tokens)
        if tokens.after is not None:
            if tokens.after >= rows.after_prompts.none_from:
                return None
            if (
                self._special is None
                and tokens.after + tokens.length <= rows.after_prompts.all_until
            ):
                if self._schedule.is_constant or tokens.length == 1:
                    return self._edit_after_prompts(h, tokens, rows)
        covered = self._mask(tokens, rows)
        weight = None
        if not self._schedule.is_constant:
            steps = (tokens.p - (rows.prompt_lengths[:, None] - 1)).clamp(min=0)
            weight = self._schedule.weights(steps)
            covered = covered & (weight != 0)
            weight = weight.to(h.device)
        covered = covered.to(h.device)
        wide = h.float()
        touched = covered
        opened = self._open(wide, tokens, rows)
        if opened is not None:
            touched = covered & opened.to(h.device)
        delta = self._edit.delta(wide, self._positions(h, tokens, rows, touched, weight))
        self._write(tokens, covered, touched, wide, delta)
        # `where` and not a product with the mask: untouched positions stay bit-equal.
        return torch.where(touched[..., None], (wide + delta).to(h.dtype), h)

    def _edit_after_prompts(self, h: Tensor, tokens: PassTokens, rows: CallRows) -> Tensor | None:
        """`__call__` for a pass after the prompts whose rows are all covered: decoding.

        It waits for no device and builds no mask that is not needed.
        """
        assert tokens.after is not None
        weight = None
        if not self._schedule.is_constant:
            weight = self._schedule.weight(tokens.after + 1)
            if weight == 0:
                return None
        wide = h.float()
        touched = self._open(wide, tokens, rows)
        if touched is not None:
            touched = touched.to(h.device)
        norms = wide.detach().norm(dim=-1)
        record = self._record(tokens, h.device)
        if touched is not None and h.device.type == "cpu" and not touched.any():
            record.log(tokens.after, touched, norms, norms[:1, :1])
            return None
        delta = self._edit.delta(wide, self._positions(h, tokens, rows, None, weight))
        record.log(tokens.after, touched, norms, delta.detach().norm(dim=-1))
        moved = (wide + delta).to(h.dtype)
        return moved if touched is None else torch.where(touched[..., None], moved, h)

    def prepare(self, tokens: PassTokens) -> None:
        """Work out which positions of the present call are covered, before its first pass.

        Raises what the scope raises for the call's prompts.
        """
        self._call_rows(tokens)

    def share_after_prompts(self, tokens: PassTokens) -> float | None:
        """The share of the edit that is made at the one token of a pass after the prompts.

        0 where none is. None where only a call of the hook can tell: it reads latents first, or
        leaves out tokens.
        """
        decides = self._gate is not None or self._conditions or self._special is not None
        if tokens.after is None or tokens.length != 1 or decides:
            return None
        reach = self._call_rows(tokens).after_prompts
        if tokens.after >= reach.none_from:
            return 0.0
        if tokens.after + 1 > reach.all_until:
            return None
        return 1.0 if self._schedule.is_constant else self._schedule.weight(tokens.after + 1)

    def delta_after_prompts(
        self, h: Float[Tensor, "rows one d_model"], weight: Float[Tensor, "rows one"]
    ) -> Float[Tensor, "#rows #one d_model"]:
        """What the edit adds to residuals in float32 where `share_after_prompts` is not None."""
        return self._edit.delta(h, EditPositions(None, weight))

    def log_after_prompts(
        self,
        tokens: PassTokens,
        norms: Float[Tensor, "rows one"],
        deltas: Float[Tensor, "rows one"],
    ) -> None:
        """Record an edit that was made by `delta_after_prompts`, or together with those of others:
        lengths of the residuals and of what was added."""
        assert tokens.after is not None
        self._report.passes = self._tracker.passes
        self._record(tokens, norms.device).log(tokens.after, None, norms, deltas)

    def _positions(
        self,
        h: Tensor,
        tokens: PassTokens,
        rows: CallRows,
        touched: Bool[Tensor, "batch seq"] | None,
        weight: Float[Tensor, "batch seq"] | float | None,
    ) -> EditPositions:
        part_of_row = None if rows.part_of_row is None else rows.part_of_row.to(h.device)
        plain = None
        if self._group.parts[0].does.from_plain:
            plain = plain_at(tokens, self.point.key).to(h.device)
        stops = rows.covered.stop
        return EditPositions(
            touched, weight, part_of_row, tokens, rows.prompt_lengths, stops, plain
        )

    def _covered(self, call: Call) -> list[RowInfo]:
        """The positions of each prompt's row that the scope of its part covers."""
        found = []
        for row, part in enumerate(self._group.parts_of(call.number, call.rows)):
            if part < 0:
                found.append(NOWHERE)
                continue
            scope, prompt = self._scopes[part], call.prompts[row]
            if scope.kind == "tail" and prompt is None:
                check_tail(call, row, scope.tail)
            covered = scope.row(call.prompt_lengths[row], prompt)
            by_place = self._group.parts[part].by_place
            if by_place is not None:
                start = max(covered.start, covered.stop - len(by_place))
                covered = dataclasses.replace(covered, start=start)
            found.append(covered)
        return found

    def _spans(self, call: Call) -> list[tuple[int, int]]:
        return [(row.start, row.stop) for row in self._covered(call)]

    def _opened(self, call: Call) -> list[bool]:
        """For each prompt's row, whether the condition of its plan holds."""
        holds = {
            condition: condition.holds(call.plain[point.key].at(last_of_prompts(call))).tolist()
            for condition, point in self._conditions.items()
        }
        found = []
        for row, part in enumerate(self._group.parts_of(call.number, call.rows)):
            condition = self._group.conditions[part] if part >= 0 else None
            found.append(condition is None or holds[condition][row])
        return found

    def _call_rows(self, tokens: PassTokens) -> CallRows:
        """The rows of the present call, computed once for each number of rows per prompt."""
        call, device = tokens.call, tokens.device
        if self._rows_call is not call:
            self._rows, self._rows_call = {}, call
        factor = call.factor(tokens.batch)
        if factor not in self._rows:
            pairs = list(zip(call.prompt_lengths, call.prompts, strict=True))
            chosen = self._group.parts_of(call.number, len(pairs))
            covered = self._covered(call)
            on_prompt = None
            if self._gate is not None and self._gate_prompt is not None:
                where = [self._gate_prompt.row(length, prompt) for length, prompt in pairs]
                on_prompt = Rows.stack(where, device).expand(factor)
            self._rows[factor] = CallRows(
                covered=Rows.stack(covered, device).expand(factor),
                prompt=on_prompt,
                prompt_lengths=expanded(call.prompt_lengths, factor, device),
                part_of_row=(
                    expanded(chosen, factor, device) if len(self._group.parts) > 1 else None
                ),
                after_prompts=AfterPrompts.of(call, covered),
                opened=(
                    torch.tensor(self._opened(call), device=device).repeat_interleave(factor)
                    if self._conditions
                    else None
                ),
            )
        return self._rows[factor]

    def _mask(self, tokens: PassTokens, rows: CallRows) -> Bool[Tensor, "batch seq"]:
        p = tokens.p
        mask = rows.covered.mask(p, tokens.real)
        if self._special is not None and tokens.ids is not None:
            self._special = self._special.to(tokens.ids.device)
            special = torch.isin(tokens.ids, self._special)
            if self._scopes[0].include_first:
                special = special & (p != 0)
            if not self._all_leave_out and rows.part_of_row is not None:
                leaves_out = torch.tensor(
                    [scope.leaves_out_special for scope in self._scopes], device=p.device
                )
                special = special & leaves_out[rows.part_of_row.clamp(min=0)][:, None]
            mask = mask & ~special
        return mask

    def _open(
        self, h: Float[Tensor, "batch seq d_model"], tokens: PassTokens, rows: CallRows
    ) -> Bool[Tensor, "batch seq"] | None:
        """Where the condition and the gate let the edit be; None without them."""
        if rows.opened is None:
            return None if self._gate is None else self._gate_open(h, tokens, rows)
        opened = rows.opened[:, None].expand(tokens.batch, tokens.length)
        return opened if self._gate is None else opened & self._gate_open(h, tokens, rows)

    def _gate_open(
        self, h: Float[Tensor, "batch seq d_model"], tokens: PassTokens, rows: CallRows
    ) -> Bool[Tensor, "batch seq"]:
        """Where the gate is open, judged by the residual before the edit."""
        assert self._gate is not None
        if self._gate.on_prompt and tokens.after is not None:
            decided = self._states[tokens.call.number].decided(tokens.batch)
            return decided[:, None].expand(tokens.batch, tokens.length)
        acts = self._gate_reader.read(h.flatten(0, 1)).unflatten(0, h.shape[:2])
        state = self._states.setdefault(tokens.call.number, GateState(self._gate))
        nowhere = torch.zeros_like(tokens.real)
        on_prompt = nowhere if rows.prompt is None else rows.prompt.mask(tokens.p, tokens.real)
        return state.open(
            acts.to(tokens.device),
            tokens.p,
            tokens.real,
            on_prompt,
            rows.prompt_lengths,
            tokens.columns,
        )

    def _write(
        self, tokens: PassTokens, covered: Tensor, touched: Tensor, h: Tensor, delta: Tensor
    ) -> None:
        norms = delta.detach().norm(dim=-1)
        record = self._record(tokens, h.device)
        record.write(tokens, covered, touched, h.detach().norm(dim=-1), norms)

    def _record(self, tokens: PassTokens, device: torch.device) -> Record:
        """The record of the present call. Earlier calls without a pass get an empty one."""
        records, calls = self._report._records, self._tracker.calls
        while len(records) <= tokens.call.number:
            records.append(Record.empty(calls[len(records)], device))
        return records[tokens.call.number]

    def _reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Move the records and gate states of rows along with their beams."""
        if self._report._records:
            self._report._records[-1].reorder(rows)
        if self._gate is not None and self._states:
            self._states[max(self._states)].reorder(rows)
