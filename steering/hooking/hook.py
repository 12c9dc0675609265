"""The steering hook: a context manager that edits the residual stream where plans say."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.model.hooks import HookPoint, hooked, resolve_site
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import EncodedPrompt
from saesteer.steering.hooking.arrangement import Group, Plans, arrange
from saesteer.steering.hooking.chats import reply_header
from saesteer.steering.hooking.edits import make_edit
from saesteer.steering.hooking.gates import GateState
from saesteer.steering.hooking.latent_values import gate_reader, matching_sae, needs_sae
from saesteer.steering.hooking.passes import Call, PassTokens
from saesteer.steering.hooking.positions import PositionTracker
from saesteer.steering.hooking.scope import NO_END, NOWHERE, RowInfo, Rows, Scope, parse_scope
from saesteer.steering.hooking.touched import Record
from saesteer.steering.hooking.touched import SteerReport as SteerReport
from saesteer.steering.hooking.touched import TouchedRow as TouchedRow
from saesteer.steering.hooking.touched import median as median
from saesteer.steering.plans.plan import Plan
from saesteer.steering.plans.schedules import parse_schedule


@contextlib.contextmanager
def steer(
    lm: LanguageModel,
    plan: Plans,
    *,
    scope: str | None = None,
    scale: float | None = None,
    beta: float | None = None,
    schedule: str | None = None,
    prompts: Sequence[EncodedPrompt] | None = None,
    prompt_lengths: Sequence[int] | None = None,
    instructions: Sequence[str] | None = None,
    include_first: bool = False,
    include_template: bool = False,
    exclude_special: bool = False,
    sae: SAE | None = None,
    force: bool = False,
) -> Iterator[SteerReport]:
    """Steer every run of `lm.model` inside the `with` block.

        with steer(lm, plan) as report:
            lm.model.generate(**inputs)
        print(report.tokens_touched, report.relative_dose)

    The model's own `generate` and forward pass are used as they are, with any cache, padding,
    batch, beams or sampling. Contexts may be nested; each adds its own edit, the outer one first.
    What was compiled with `torch.compile` runs uncompiled meanwhile.

    Several plans at once are given as a list: each edits what the one before left, and `parts` of
    the report says what each did. `ByRow([a, None, b])` gives each row of the batch its own plan;
    beams and returned sequences follow the plan of their prompt.

    What `generate` is given is the prompt. When the model is called directly, the first row it is
    given is the prompt, and a later row that repeats it and appends to it goes on from there;
    `prompt_lengths` or `prompts` say where the prompt ends in a row that holds an answer too.

    Args:
        plan: a plan or the path of one, a `ByRow` of plans, or a list of any of these.
        scope, scale, beta, schedule: replace those of every plan. `scale` 0 is off: the model is
            not touched.
        prompts: the prompts that will be run, in any order. Needed for the scopes `span` and
            `after-instruction`, and for `prompt`, `all` and `assistant` to know template tokens
            (without them only special tokens are left out).
        prompt_lengths: real tokens of each row's prompt.
        instructions: texts for the scope `after-instruction`; by default those of the plan's task.
        include_first: scopes `prompt` and `all` keep position 0.
        include_template: scopes `prompt`, `all` and `assistant` keep template and special tokens.
        exclude_special: every scope leaves out special tokens.
        sae: the SAE of the plans, for methods and gates that read latents; where a plan cannot do
            without, it is otherwise loaded from where the plan says.
        force: steer a model with other weights than the plan's.

    Raises:
        UserError: a plan for another model; on leaving: the model did not run, or a plan's scope
            covered no token (unless the multiplier is 0 or the block raised). A gate that stayed
            closed is no error: see `tokens_gated_off` in the report.
        UsageError: a scope, schedule, gate or dose that means nothing.
    """
    changes = {"scope": scope, "scale": scale, "beta": beta, "schedule": schedule}
    layers = arrange(plan, {k: v for k, v in changes.items() if v is not None})
    for layer in layers:
        for group in layer:
            for each in group.plans:
                each.check_model(lm, force)
    reports = [SteerReport() for _ in layers]
    report = reports[0] if len(reports) == 1 else SteerReport(parts=tuple(reports))
    layers = [[group for group in layer if group.plans[0].scale != 0] for layer in layers]
    if not any(layers):
        yield report
        return
    options = _ScopeOptions(prompts, instructions, include_first, include_template, exclude_special)
    tracker = PositionTracker(lm, prompts, prompt_lengths)
    with contextlib.ExitStack() as stack:
        stack.enter_context(tracker.listening())
        for layer, theirs in zip(layers, reports, strict=True):
            if len(layer) > 1:
                theirs.parts = tuple(SteerReport() for _ in layer)
            for group, own in zip(layer, theirs.parts or (theirs,), strict=False):
                hook = _SteerHook(lm, group, options, tracker, own, sae, force)
                stack.enter_context(hooked(hook.point, hook))
        yield report
        report.passes = tracker.passes
    for layer, theirs in zip(layers, reports, strict=True):
        if layer:
            _check(theirs, tracker.passes, layer)


@dataclasses.dataclass(frozen=True)
class _ScopeOptions:
    """The arguments of `steer` that say more of a scope than its name."""

    prompts: Sequence[EncodedPrompt] | None
    instructions: Sequence[str] | None
    include_first: bool
    include_template: bool
    exclude_special: bool

    def resolve(self, lm: LanguageModel, plan: Plan) -> Scope:
        """The scope with everything it needs; raises at once what would fail at the first pass."""
        scope = parse_scope(
            plan.scope,
            include_first=self.include_first,
            include_template=self.include_template,
            exclude_special=self.exclude_special,
        )
        if scope.kind == "after-instruction":
            texts = _task_texts(plan) if self.instructions is None else self.instructions
            scope = dataclasses.replace(scope, instructions=tuple(texts))
        if scope.kind == "assistant":
            scope = dataclasses.replace(scope, reply_header=reply_header(lm))
        if scope.needs_prompts:
            for prompt in self.prompts or ():
                scope.row(len(prompt), prompt)
            if not self.prompts:
                scope.row(0)
        return scope


@dataclasses.dataclass(frozen=True, eq=False)
class _CallRows:
    """What one call's rows are told by their plans and prompts, one line per row of the pass."""

    covered: Rows
    prompt: Rows | None
    """The prompt's own tokens, for gates that are decided on it."""
    prompt_lengths: Int[Tensor, " batch"]
    plan_of_row: Int[Tensor, " batch"] | None
    behind: "_Behind"


@dataclasses.dataclass(frozen=True)
class _Behind:
    """What the scopes say of columns behind the prompts, as numbers: no tensor is looked at.

    Column n behind its prompt has position length + n in each row, and scopes are intervals.
    """

    some_until: int
    """From this column on no row is covered: scopes that reach behind a prompt begin in it."""
    all_until: int
    """Up to this column every row is covered."""

    @classmethod
    def of(cls, call: Call, covered: Sequence[RowInfo]) -> "_Behind":
        ends = call.lengths
        pairs = list(zip(covered, ends, strict=True))
        some_until = max(row.stop - end for row, end in pairs)
        exact = call.prompt_lengths == ends and all(
            not row.excluded or row.excluded[-1] < end for row, end in pairs
        )
        if not exact or any(row.start > end for row, end in pairs):
            return cls(NO_END, 0)
        return cls(some_until, min(row.stop - end for row, end in pairs))


class _SteerHook:
    """Edits what passes the hook point by one group of plans, and writes down what it did."""

    def __init__(
        self,
        lm: LanguageModel,
        group: Group,
        options: _ScopeOptions,
        tracker: PositionTracker,
        report: SteerReport,
        sae: SAE | None,
        force: bool,
    ) -> None:
        first = group.plans[0]
        self.point: HookPoint = resolve_site(lm, first.layer, first.site)
        self._group, self._tracker, self._report = group, tracker, report
        self._scopes = [options.resolve(lm, plan) for plan in group.plans]
        self._schedule = parse_schedule(first.schedule)
        self._d_model = lm.d_model
        if sae is None and needs_sae(first):
            sae = matching_sae(first, None, force)
        self._edit = make_edit(group.plans, sae, force)
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
        self._rows: dict[int, _CallRows] = {}
        self._rows_call: Call | None = None
        tracker.on_reorder.append(self._reorder)

    def __call__(self, h: Tensor) -> Tensor | None:
        tokens = self._tracker.current
        if tokens is None:
            return None  # a block that is run by itself is in no row
        self._report.passes = self._tracker.passes
        if h.shape != (tokens.batch, tokens.length, self._d_model):
            raise UserError(
                f"`site` {self.point.site} ({self.point.module_path}) carries a tensor of shape "
                f"{list(h.shape)}, not [batch, tokens, {self._d_model}]: choose a site on the "
                "residual stream, such as resid_post"
            )
        rows = self._call_rows(tokens)
        if tokens.after is not None:
            if tokens.after >= rows.behind.some_until:
                return None
            if self._special is None and tokens.after + tokens.length <= rows.behind.all_until:
                if self._schedule.is_constant or tokens.length == 1:
                    return self._behind(h, tokens, rows)
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
        if self._gate is not None:
            touched = covered & self._open(wide, tokens, rows).to(h.device)
        plan_of_row = None if rows.plan_of_row is None else rows.plan_of_row.to(h.device)
        delta = self._edit.delta(wide, touched, weight, plan_of_row)
        self._write(tokens, covered, touched, wide, delta)
        # Untouched positions keep their very bits: `where`, not a product with the mask.
        return torch.where(touched[..., None], (wide + delta).to(h.dtype), h)

    def _behind(self, h: Tensor, tokens: PassTokens, rows: _CallRows) -> Tensor | None:
        """The same for a pass behind the prompts that is covered in every row: decoding.

        Nothing here waits for a device, nor builds a mask where none is needed.
        """
        assert tokens.after is not None
        weight = None
        if not self._schedule.is_constant:
            weight = self._schedule.weight(tokens.after + 1)
            if weight == 0:
                return None
        wide = h.float()
        touched = None
        if self._gate is not None:
            touched = self._open(wide, tokens, rows).to(h.device)
        norms = wide.detach().norm(dim=-1)
        record = self._record(tokens, h.device)
        if touched is not None and h.device.type == "cpu" and not touched.any():
            record.log(tokens.after, touched, norms, norms[:1, :1])
            return None
        plan_of_row = None if rows.plan_of_row is None else rows.plan_of_row.to(h.device)
        delta = self._edit.delta(wide, None, weight, plan_of_row)
        record.log(tokens.after, touched, norms, delta.detach().norm(dim=-1))
        moved = (wide + delta).to(h.dtype)
        return moved if touched is None else torch.where(touched[..., None], moved, h)

    def _call_rows(self, tokens: PassTokens) -> _CallRows:
        """The rows of the present call, once for each number of rows per prompt."""
        call, device = tokens.call, tokens.device
        if self._rows_call is not call:
            self._rows, self._rows_call = {}, call
        factor = call.factor(tokens.batch)
        if factor not in self._rows:
            pairs = list(zip(call.prompt_lengths, call.prompts, strict=True))
            chosen = self._group.plans_of(call.number, len(pairs))
            covered = [
                NOWHERE if i < 0 else self._scopes[i].row(length, prompt)
                for i, (length, prompt) in zip(chosen, pairs, strict=True)
            ]
            on_prompt = None
            if self._gate is not None and self._gate_prompt is not None:
                where = [self._gate_prompt.row(length, prompt) for length, prompt in pairs]
                on_prompt = Rows.stack(where, device).expand(factor)
            self._rows[factor] = _CallRows(
                covered=Rows.stack(covered, device).expand(factor),
                prompt=on_prompt,
                prompt_lengths=_expanded(call.prompt_lengths, factor, device),
                plan_of_row=(
                    _expanded(chosen, factor, device) if len(self._group.plans) > 1 else None
                ),
                behind=_Behind.of(call, covered),
            )
        return self._rows[factor]

    def _mask(self, tokens: PassTokens, rows: _CallRows) -> Bool[Tensor, "batch seq"]:
        p = tokens.p
        mask = rows.covered.mask(p, tokens.real)
        if self._special is not None and tokens.ids is not None:
            self._special = self._special.to(tokens.ids.device)
            special = torch.isin(tokens.ids, self._special)
            if self._scopes[0].include_first:
                special = special & (p != 0)
            if not self._all_leave_out and rows.plan_of_row is not None:
                leaves_out = torch.tensor(
                    [scope.leaves_out_special for scope in self._scopes], device=p.device
                )
                special = special & leaves_out[rows.plan_of_row.clamp(min=0)][:, None]
            mask = mask & ~special
        return mask

    def _open(
        self, h: Float[Tensor, "batch seq d_model"], tokens: PassTokens, rows: _CallRows
    ) -> Bool[Tensor, "batch seq"]:
        """Where the gate is open, by the residual as it arrives."""
        assert self._gate is not None
        if self._gate.on_prompt and tokens.after is not None:
            decided = self._states[tokens.call.number].decided(tokens.batch)
            return decided[:, None].expand(tokens.batch, tokens.length)
        acts = self._gate_reader.read(h.flatten(0, 1)).unflatten(0, h.shape[:2])
        state = self._states.setdefault(tokens.call.number, GateState(self._gate))
        nowhere = torch.zeros_like(tokens.real)
        on_prompt = nowhere if rows.prompt is None else rows.prompt.mask(tokens.p, tokens.real)
        return state.open(
            acts.to(tokens.device), tokens.p, tokens.real, on_prompt, rows.prompt_lengths,
            tokens.columns,
        )  # fmt: skip

    def _write(
        self, tokens: PassTokens, covered: Tensor, touched: Tensor, h: Tensor, delta: Tensor
    ) -> None:
        norms = delta.detach().norm(dim=-1)
        record = self._record(tokens, h.device)
        record.write(tokens, covered, touched, h.detach().norm(dim=-1), norms)

    def _record(self, tokens: PassTokens, device: torch.device) -> Record:
        """The record of the present call; one that ended before its first pass has one too."""
        records, calls = self._report._records, self._tracker.calls
        while len(records) <= tokens.call.number:
            records.append(Record.empty(calls[len(records)], device))
        return records[tokens.call.number]

    def _reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Beams moved: what was remembered and written of a row moves with it."""
        if self._report._records:
            self._report._records[-1].reorder(rows)
        if self._gate is not None and self._states:
            self._states[max(self._states)].reorder(rows)


def _expanded(values: Sequence[int], factor: int, device: torch.device) -> Int[Tensor, " batch"]:
    """One number per row of a pass, every prompt's `factor` times."""
    return torch.tensor(list(values), dtype=torch.int64, device=device).repeat_interleave(factor)


def _task_texts(plan: Plan) -> Sequence[str]:
    """The wordings of the instruction that the plan was ranked for."""
    if plan.task is None or plan.task.instructions:
        return () if plan.task is None else plan.task.instructions
    from saesteer.steering.tasks.task import builtin_tasks, load_task

    # An older plan: a built-in task of that name is the right one only when nothing else changed.
    if plan.task.name in builtin_tasks():
        task = load_task(plan.task.name)
        if task.hash == plan.task.hash:
            return task.wordings
    raise UsageError(
        "`scope` after-instruction needs the wordings of the plan's task, and this plan of "
        f"{plan.task.name} does not hold them: make the plan again with rank, or use another "
        "`scope`"
    )


def _check(report: SteerReport, passes: int, groups: Sequence[Group]) -> None:
    """A run that was meant to be steered and was not is an error."""
    if passes == 0:
        raise UserError(
            "the model did not run inside steer(...): run the model that was given to it, inside "
            "the with block"
        )
    if report.tokens_touched + report.tokens_gated_off == 0:
        scopes = dict.fromkeys(plan.scope for group in groups for plan in group.plans)
        raise UserError(
            f"steering touched no token: `scope` {' and '.join(scopes)} covers no position of the "
            f"{passes} forward passes; choose another `scope` (generation steers from the "
            "first generated token on) or generate more tokens"
        )
