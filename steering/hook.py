"""The steering hook: a context manager that edits the residual stream where a plan says."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.hooks import HookPoint, hooked, resolve_site
from saesteer.sae.models import LanguageModel
from saesteer.sae.prompts import EncodedPrompt
from saesteer.steering.edits import Edit
from saesteer.steering.plan import Plan
from saesteer.steering.plan_file import load_plan
from saesteer.steering.positions import Call, PassTokens, PositionTracker
from saesteer.steering.scope import Rows, Scope, parse_scope


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

    @property
    def relative_doses(self) -> Float[Tensor, " touched"]:
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


@dataclass(eq=False)
class SteerReport:
    """What `steer` did so far; a position that passes again (no cache, drafts) counts once."""

    passes: int = 0
    """Forward passes of the model inside the context."""
    _records: list["_Record"] = field(default_factory=list)

    @property
    def rows(self) -> list[TouchedRow]:
        """Every row of every call, in order; rows where nothing was touched are among them."""
        return [row for record in self._records for row in record.touched()]

    def call_rows(self, call: int) -> list[TouchedRow]:
        """The rows of one call."""
        return self._records[call].touched()

    @property
    def tokens_touched(self) -> int:
        """Edited positions."""
        return sum(len(row.positions) for row in self.rows)

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


@dataclass(eq=False)
class _Record:
    """Norms by row and position of one call; NaN where nothing was touched.

    Column p + 1 holds position p; column 0 takes what is not to be kept, so that writing needs no
    look at the mask's content.
    """

    call: Call
    residual: Float[Tensor, "batch columns"]
    delta: Float[Tensor, "batch columns"]

    def write(
        self,
        tokens: PassTokens,
        mask: Bool[Tensor, "batch seq"],
        residual: Float[Tensor, "batch seq"],
        delta: Float[Tensor, "batch seq"],
    ) -> None:
        column = torch.where(mask, tokens.p + 1, 0).to(residual.device)
        width = tokens.columns + 1
        self.residual = _grown(self.residual, len(mask), width).scatter(1, column, residual)
        self.delta = _grown(self.delta, len(mask), width).scatter(1, column, delta)

    def touched(self) -> list[TouchedRow]:
        residual, delta = self.residual[:, 1:].cpu(), self.delta[:, 1:].cpu()
        factor = self.call.factor(len(residual))
        rows = []
        for i, norms in enumerate(delta):
            at = torch.nonzero(~norms.isnan()).flatten()
            length = self.call.prompt_lengths[i // factor]
            rows.append(TouchedRow(self.call.number, i, length, at, residual[i, at], norms[at]))
        return rows


@contextlib.contextmanager
def steer(
    lm: LanguageModel,
    plan: Plan | str | Path,
    *,
    scope: str | None = None,
    scale: float | None = None,
    beta: float | None = None,
    prompts: Sequence[EncodedPrompt] | None = None,
    prompt_lengths: Sequence[int] | None = None,
    instructions: Sequence[str] | None = None,
    include_first: bool = False,
    include_template: bool = False,
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

    What `generate` is given is the prompt. When the model is called directly, the first row it is
    given is the prompt, and a later row that repeats it and appends to it goes on from there;
    `prompt_lengths` or `prompts` say where the prompt ends in a row that holds an answer too.

    Args:
        plan: a plan, or the path of one.
        scope, scale, beta: replace the plan's own. `scale` 0 is off: the model is not touched.
        prompts: the prompts that will be run, in any order. Needed for the scopes `span` and
            `after-instruction`, and for `prompt` and `all` to know template tokens (without them
            only special tokens are left out).
        prompt_lengths: real tokens of each row's prompt.
        instructions: texts for the scope `after-instruction`; by default those of the plan's task.
        include_first: scopes `prompt` and `all` keep position 0.
        include_template: scopes `prompt` and `all` keep template and special tokens.
        sae: the SAE of the plan, for methods that read latents; a TopK SAE is otherwise loaded
            from where the plan says.
        force: steer a model with other weights than the plan's.

    Raises:
        UserError: a plan for another model; on leaving: the model did not run, or no token was
            touched (unless the multiplier is 0 or the block raised).
        UsageError: a scope or a dose that means nothing.
    """
    if not isinstance(plan, Plan):
        plan = load_plan(plan)
    changes = {"scope": scope, "scale": scale, "beta": beta}
    plan = dataclasses.replace(plan, **{k: v for k, v in changes.items() if v is not None})  # type: ignore[arg-type]
    plan.check_model(lm, force)
    report = SteerReport()
    if plan.scale == 0:
        yield report
        return
    where = _resolve_scope(plan, prompts, instructions, include_first, include_template)
    point = resolve_site(lm, plan.layer, plan.site)
    tracker = PositionTracker(lm, prompts, prompt_lengths)
    hook = _SteerHook(lm, Edit(plan, sae, force), where, point, tracker, report)
    with tracker.listening(), hooked(point, hook):
        yield report
    _check(report, plan)


class _SteerHook:
    """Edits what passes the hook point, and writes down what it did."""

    def __init__(
        self,
        lm: LanguageModel,
        edit: Edit,
        scope: Scope,
        point: HookPoint,
        tracker: PositionTracker,
        report: SteerReport,
    ) -> None:
        self._edit, self._scope, self._point = edit, scope, point
        self._tracker, self._report = tracker, report
        self._d_model = lm.d_model
        self._special = lm.special_ids if scope.leaves_out_special else None
        self._rows: Rows | None = None
        self._rows_call: Call | None = None

    def __call__(self, h: Tensor) -> Tensor | None:
        tokens = self._tracker.current
        if tokens is None:
            return None  # a block that is run by itself is in no row
        self._report.passes = self._tracker.passes
        if h.shape != (*tokens.p.shape, self._d_model):
            raise UserError(
                f"--site {self._point.site} ({self._point.module_path}) carries a tensor of shape "
                f"{list(h.shape)}, not [batch, tokens, {self._d_model}]: choose a site on the "
                "residual stream, such as resid_post"
            )
        mask = self._mask(tokens).to(h.device)
        wide = h.float()
        delta = self._edit.delta(wide, mask)
        self._write(tokens, mask, wide, delta)
        # Untouched positions keep their very bits: `where`, not a product with the mask.
        return torch.where(mask[..., None], (wide + delta).to(h.dtype), h)

    def _mask(self, tokens: PassTokens) -> Bool[Tensor, "batch seq"]:
        call, p = tokens.call, tokens.p
        if self._rows is None or self._rows_call is not call:
            rows = [
                self._scope.row(length, prompt)
                for length, prompt in zip(call.prompt_lengths, call.prompts, strict=True)
            ]
            self._rows, self._rows_call = Rows.stack(rows, p.device), call
        mask = self._rows.expand(call.factor(len(p))).mask(p, tokens.real)
        if self._special is not None and tokens.ids is not None:
            self._special = self._special.to(tokens.ids.device)
            special = torch.isin(tokens.ids, self._special)
            mask = mask & ~(special & (p != 0) if self._scope.include_first else special)
        return mask

    def _write(self, tokens: PassTokens, mask: Tensor, h: Tensor, delta: Tensor) -> None:
        records, call = self._report._records, tokens.call
        while len(records) <= call.number:
            empty = h.new_full((len(h), 1), torch.nan)
            records.append(_Record(self._tracker.calls[len(records)], empty, empty))
        norms = delta.detach().norm(dim=-1).expand(mask.shape)
        records[call.number].write(tokens, mask, h.detach().norm(dim=-1), norms)


def median(parts: Iterable[Tensor]) -> float | None:
    """The median over all values of several tensors; None when there are none."""
    values = [part.double().numpy() for part in parts]
    joined = np.concatenate(values) if values else np.empty(0)
    return float(np.median(joined)) if joined.size else None


def _grown(buffer: Tensor, batch: int, width: int) -> Tensor:
    """`buffer` with room for `batch` rows and `width` columns, NaN where it is new."""
    if len(buffer) < batch:
        buffer = buffer.repeat_interleave(batch // len(buffer), dim=0)
    if buffer.shape[1] < width:
        more = buffer.new_full((len(buffer), width - buffer.shape[1]), torch.nan)
        buffer = torch.cat([buffer, more], dim=1)
    return buffer


def _resolve_scope(
    plan: Plan,
    prompts: Sequence[EncodedPrompt] | None,
    instructions: Sequence[str] | None,
    include_first: bool,
    include_template: bool,
) -> Scope:
    """The scope with everything it needs; raises at once what would fail at the first pass."""
    scope = parse_scope(plan.scope, include_first=include_first, include_template=include_template)
    if scope.kind == "after-instruction":
        texts = _task_texts(plan) if instructions is None else instructions
        scope = dataclasses.replace(scope, instructions=tuple(texts))
    if scope.needs_prompts:
        for prompt in prompts or ():
            scope.row(len(prompt), prompt)
        if not prompts:
            scope.row(0)
    return scope


def _task_texts(plan: Plan) -> Sequence[str]:
    """The wordings of the instruction that the plan was ranked for."""
    if plan.task is None or plan.task.instructions:
        return () if plan.task is None else plan.task.instructions
    from saesteer.steering.tasks import builtin_tasks, load_task

    # An older plan: a built-in task of that name is the right one only when nothing else changed.
    if plan.task.name in builtin_tasks():
        task = load_task(plan.task.name)
        if task.hash == plan.task.hash:
            return task.wordings
    raise UsageError(
        "--scope after-instruction needs the wordings of the plan's task, and this plan of "
        f"{plan.task.name} does not hold them: make the plan again with rank, or use another "
        "--scope"
    )


def _check(report: SteerReport, plan: Plan) -> None:
    """A run that was meant to be steered and was not is an error."""
    if report.passes == 0:
        raise UserError(
            "the model did not run inside steer(...): run the model that was given to it, inside "
            "the with block"
        )
    if report.tokens_touched == 0:
        raise UserError(
            f"steering touched no token: --scope {plan.scope} covers no position of the "
            f"{report.passes} forward passes; choose another --scope (generation steers from the "
            "first generated token on) or generate more tokens"
        )
