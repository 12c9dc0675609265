"""The steering hook: a context manager that edits the residual stream where plans say."""

import contextlib
from collections.abc import Iterator, Sequence

from saesteer.checkpoints.errors import UserError
from saesteer.sae.model.hooks import hooked
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import EncodedPrompt
from saesteer.steering.hooking.arrangement import Arranged, Group, Plans, arrange
from saesteer.steering.hooking.group_hook import GroupHook
from saesteer.steering.hooking.latent_values import SAEs
from saesteer.steering.hooking.scope_arguments import ScopeArguments
from saesteer.steering.hooking.touched import SteerReport as SteerReport
from saesteer.steering.hooking.touched import TouchedRow as TouchedRow
from saesteer.steering.hooking.touched import median as median
from saesteer.steering.hooking.tracking.positions import PositionTracker


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
    sae: SAEs = None,
    force: bool = False,
) -> Iterator[SteerReport]:
    """Steer every run of `lm.model` inside the `with` block.

        with steer(lm, plan) as report:
            lm.model.generate(**inputs)
        print(report.tokens_touched, report.relative_dose)

    The model's own `generate` and forward pass are used as they are, with any cache, padding,
    batch, beams or sampling. Contexts may be nested; each adds its own edit, the outer one first.
    What was compiled with `torch.compile` runs uncompiled meanwhile.

    All parts of a plan act together. Several plans are given as a list, and each edits the result
    of the one before; `parts` of the report then holds one report per plan, whose own `parts` hold
    one per part. `ByRow([a, None, b])` gives each row of the batch its own plan; beams and returned
    sequences follow the plan of their prompt.

    The input of `generate` is the prompt. When the model is called directly, its first input is the
    prompt, and a later input that repeats it and appends tokens continues it. For inputs that
    already hold an answer, `prompt_lengths` or `prompts` say where the prompt ends.

    Args:
        plan: a plan or the path of one, a `ByRow` of plans, or a list of any of these.
        scope, scale, beta, schedule: replace those of every plan; see `Plan.with_changes` for plans
            of several parts. With `scale` 0 the model is not touched.
        prompts: the prompts that will be run, in any order. Needed for the scopes `span` and
            `after-instruction`, and for `prompt`, `all` and `assistant` to leave out template
            tokens (without them only special tokens are left out).
        prompt_lengths: real tokens of each row's prompt.
        instructions: texts for the scope `after-instruction`; by default those of the plan's task.
        include_first: scopes `prompt` and `all` keep position 0.
        include_template: scopes `prompt`, `all` and `assistant` keep template and special tokens.
        exclude_special: every scope leaves out special tokens.
        sae: the SAE of the plans, or a list with that of each part, for methods and gates that read
            latents. An SAE that is needed and not given is loaded from the source in the plan.
        force: steer a model with other weights than the plan's.

    Raises:
        UserError: a plan for another model; on leaving: the model did not run, or the scope of a
            plan's part covered no token (unless its scale is 0 or the block raised). A gate that
            stayed closed is no error: see `tokens_gated_off` in the report.
        UsageError: an invalid scope, schedule, gate or dose, or a change of a field whose values
            differ between the parts of a plan.
    """
    changes = {"scope": scope, "scale": scale, "beta": beta, "schedule": schedule}
    entries = arrange(plan, {k: v for k, v in changes.items() if v is not None})
    for entry in entries:
        for each in entry.plans:
            each.check_model(lm, force)
    reports = [_report(entry.groups) for entry in entries]
    report = reports[0] if len(reports) == 1 else SteerReport(parts=tuple(reports))
    if all(group.is_off for entry in entries for group in entry.groups):
        yield report
        return
    arguments = ScopeArguments(
        prompts, instructions, include_first, include_template, exclude_special
    )
    tracker = PositionTracker(lm, prompts, prompt_lengths)
    with contextlib.ExitStack() as stack:
        stack.enter_context(tracker.listening())
        for entry, theirs in zip(entries, reports, strict=True):
            for group, own in zip(entry.groups, theirs.parts or (theirs,), strict=True):
                if not group.is_off:
                    hook = GroupHook(lm, group, arguments, tracker, own, sae, force)
                    stack.enter_context(hooked(hook.point, hook))
        yield report
        for every in (report, *reports):
            every.passes = tracker.passes
    for entry, theirs in zip(entries, reports, strict=True):
        _check_entry(theirs, tracker.passes, entry)


def _report(groups: Sequence[Group]) -> SteerReport:
    """A report; where there are several groups, with one in `parts` for each."""
    return SteerReport(parts=tuple(SteerReport() for _ in groups) if len(groups) > 1 else ())


def _check_entry(report: SteerReport, passes: int, entry: Arranged) -> None:
    """Raise UserError unless every part of a plan, or any part of a ByRow, covered some token."""
    if entry.by_row:
        groups = [group for group in entry.groups if not group.is_off]
        if groups:
            _check(report, passes, groups)
        return
    for group, own in zip(entry.groups, report.parts or (report,), strict=True):
        if not group.is_off:
            _check(own, passes, [group])


def _check(report: SteerReport, passes: int, groups: Sequence[Group]) -> None:
    """Raise UserError when the model did not run, or the scopes covered no token."""
    if passes == 0:
        raise UserError(
            "the model did not run inside steer(...): run the model that was given to it, inside "
            "the with block"
        )
    if report.tokens_touched + report.tokens_gated_off == 0:
        scopes = dict.fromkeys(part.scope for group in groups for part in group.parts)
        raise UserError(
            f"steering touched no token: `scope` {' and '.join(scopes)} covers no position of the "
            f"{passes} forward passes; choose another `scope` (generation steers from the "
            "first generated token on) or generate more tokens"
        )
