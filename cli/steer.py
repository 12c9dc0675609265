"""`saesteer steer`: generate text with a steering plan."""

import math
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.cli.inputs import (
    open_model,
    open_sae,
    prompts_in,
    read_prompts,
    reserved,
    take_folder,
)
from saesteer.cli.output import Document, print_json
from saesteer.cli.output import number as figure
from saesteer.cli.progress import Report, reporting
from saesteer.cli.steer_flags import add_flags as add_flags
from saesteer.cli.steer_output import print_blocks, print_changes, write_answers
from saesteer.sae.config import check_sampling
from saesteer.steering.ranking.config import RankConfig

if TYPE_CHECKING:
    from saesteer.checkpoints.sae_file import SAE
    from saesteer.sae.model.language_model import LanguageModel
    from saesteer.steering.hooking.latent_changes import LatentChange
    from saesteer.steering.plans.plan import Plan

EXAMPLE = 'saesteer steer --plan runs/plan -p "The weather is nice today." --baseline'
NEEDED = "(--plan FILE | --sae DIR --latents ID:V,...) -p TEXT"


def run(args: Namespace) -> int:
    """Generate, and print one block or one JSON line for each prompt."""
    _check_flags(args)
    texts = read_prompts(args)
    with (
        reserved(args, model=args.model, plan=args.plan, sae=args.sae, prompts=args.prompts),
        reporting(args) as report,
    ):
        neutral = None if args.dose_on is None else prompts_in(args.dose_on, "--dose-on")
        lm, plan, sae = _open(args, report)
        if plan is not None and args.dose is not None:
            plan = _dosed(args, lm, plan, neutral, report)
        rows = _generate(args, texts, lm, plan, sae, report)
        if args.beside:
            _add_other_ways(args, texts, lm, plan, rows, report)
        changes = []
        if plan is not None and args.explain:
            changes = _explained(args, texts, lm, plan, sae)
        if args.out is not None:
            write_answers(take_folder(args), args, lm, rows, plan if args.dose else None)
    if args.json:
        for row in rows:
            print_json(row, one_a_line=True)
    else:
        print_blocks(args, rows)
        print_changes(changes)
    return 0


def _check_flags(args: Namespace) -> None:
    """Refuse flags that contradict each other or are out of range, before anything is loaded."""
    check_sampling(args.temperature, args.top_p, args.batch_size, args.max_new_tokens)
    sampled = [flag for flag in _SAMPLED.values() if getattr(args, flag) is not None]
    if sampled and "meandiff" not in (args.beside or ()):
        raise UsageError(
            f"--{sampled[0].replace('_', '-')} is about the replies that a mean difference is read "
            "on: give --beside meandiff with it, or leave it out"
        )
    _reply_config(args)
    if args.plan is not None and args.latents is not None:
        raise UsageError(
            "--plan and --latents exclude each other: give --plan, or --sae with --latents"
        )
    if args.plan is None and (args.sae is None) != (args.latents is None):
        raise UsageError("--sae and --latents belong together: give both, or --plan")
    if args.plan is None and args.sae is None:
        if not args.baseline:
            raise UsageError(
                "nothing to steer with: give --plan FILE, or --sae DIR --latents ID:VALUE; for the "
                "unsteered model give --baseline alone"
            )
        _refuse(
            args,
            "layer",
            "site",
            "method",
            "unit",
            "scale",
            "beta",
            "scope",
            "schedule",
            "gate",
            "also",
            "dose",
            reason="needs --plan, or --sae with --latents",
        )
    if args.plan is not None:
        _refuse(args, "site", reason="is for --latents: a plan says where it steers")
    if args.latents is not None:
        _refuse(args, "beta", reason="needs a plan's mu and sigma; with --latents use --scale")
    if args.dose is not None and (args.dose[0] not in ("ce", "kl") or not args.dose[1] > 0):
        raise UsageError(
            f"--dose must be ce=NATS or kl=NATS above 0, got {args.dose[0]}={args.dose[1]:g}"
        )
    if args.dose is not None and args.scale is not None:
        raise UsageError("--dose finds the scale: leave --scale out")
    if args.dose_on is not None and args.dose is None:
        raise UsageError("--dose-on is for --dose: give --dose ce=0.1, or leave it out")
    if args.explain and (args.json or (args.plan is None and args.sae is None)):
        raise UsageError(
            "--explain is a table about a plan's latents: give a plan and leave --json out (in "
            "Python it is steering.read_back)"
        )
    if args.scale == 0:
        raise UsageError(
            "--scale 0 would steer nothing: leave out the plan and give --baseline for the "
            "unsteered text, or give --baseline with another --scale"
        )


def _refuse(args: Namespace, *names: str, reason: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise UsageError(f"--{name} {reason}")


def _open(args: Namespace, report: Report) -> "tuple[LanguageModel, Plan | None, SAE | None]":
    """The model, the plan (None: unsteered) and the SAE of `--sae`."""
    from saesteer.sae.model.sae_places import steered
    from saesteer.steering import load_plan, plan_from_latents, with_gate
    from saesteer.steering.hooking.gates import parse_gate
    from saesteer.steering.plans.from_sae import check_values, parse_latents

    changes = {
        name: value
        for name in ("method", "unit", "scale", "beta", "scope", "schedule")
        if (value := getattr(args, name)) is not None
    }
    if args.plan is not None:
        plan = _opened_plan(args, changes)
        if plan.is_off:
            raise UsageError(
                f"--plan {args.plan} has scale 0 and would steer nothing: give another --scale"
            )
        if args.layer is not None and args.also:
            raise UsageError("--layer is for one plan: leave it out with --also")
        if args.layer is not None and args.layer % plan.model.n_layers != plan.layer:
            raise UsageError(
                f"--layer {args.layer} conflicts with --plan {args.plan}, which steers layer "
                f"{plan.layer}: leave --layer out"
            )
        sae = None if args.sae is None else open_sae(args, report)
        if args.gate is not None:
            for number in range(len(plan.parts)):
                plan = with_gate(plan, args.gate, sae, part=number)
        _check_ways(args, plan)
        return open_model(args, report, name=plan.model.name), plan, sae
    if args.sae is None:
        _check_ways(args, None)
        return open_model(args, report), None, None
    values = parse_latents(args.latents)
    sae = open_sae(args, report)
    check_values(sae, values, **changes)
    for other in args.also or ():
        load_plan(other)
    if args.gate is not None:
        parse_gate(args.gate)
    lm = open_model(args, report, name=sae.spec.model_name)
    steered(sae, lm, layer=args.layer, site=args.site, force=args.force)
    plan = plan_from_latents(lm, sae, args.layer, values, site=args.site, **changes)
    if args.gate is not None:
        plan = with_gate(plan, args.gate, sae)
    for other in args.also or ():
        plan = _joined(args, plan, other, {k: v for k, v in changes.items() if k in _OF_EVERY})
    return lm, plan, sae.to(lm.device)


def _reply_config(args: Namespace) -> RankConfig:
    """How the replies that a mean difference is read on are sampled."""
    # `given` falls back to a flag of the field's own name, which means the answers here.
    values = {field: getattr(args, flag) for field, flag in _SAMPLED.items()}
    try:
        return RankConfig(**{field: value for field, value in values.items() if value is not None})
    except UsageError as error:
        said = str(error)
        for field, flag in _SAMPLED.items():
            said = said.replace(f"`{field}`", f"--{flag.replace('_', '-')}")
        raise UsageError(said) from error


def _check_ways(args: Namespace, plan: "Plan | None") -> None:
    if args.beside:
        from saesteer.steering.evaluation.side_by_side import check_ways

        check_ways(args.beside, plan)


_SAMPLED = {
    "contents": "replies_count",
    "max_new_tokens": "replies_tokens",
    "temperature": "replies_temperature",
    "top_p": "replies_top_p",
}
"""The flag of each field that says how the replies for `--beside meandiff` are sampled."""

_OF_EVERY = ("scale", "scope", "schedule")
"""Flags that mean the same of latents by number and of the plans beside them."""


def _opened_plan(args: Namespace, changes: dict[str, Any]) -> "Plan":
    """`--plan` and the plans of `--also` as one plan of all their parts, with the flags' values."""
    from saesteer.steering import load_plan

    plan = load_plan(args.plan).with_changes(**changes)
    for other in args.also or ():
        plan = _joined(args, plan, other, changes)
    return plan


def _joined(args: Namespace, plan: "Plan", other: str, changes: dict[str, Any]) -> "Plan":
    """A plan with the parts of another one behind its own."""
    from saesteer.steering import load_plan

    theirs = load_plan(other).with_changes(**changes)
    if theirs.model.hash != plan.model.hash and not args.force:
        raise UserError(
            f"--also {other} was made for {theirs.model.name} with weights {theirs.model.hash}, "
            f"and the plan before it for {plan.model.name} with weights {plan.model.hash}: give "
            "plans for one model, or --force"
        )
    if plan.when is not None or theirs.when is not None:
        raise UsageError(
            f"--also {other}: one of the plans acts only where its condition holds, and joined it "
            "would decide for both: use steering.steer(lm, [first, second]) from Python"
        )
    ours = None if plan.task is None else plan.task.name
    if theirs.task is not None and theirs.task.name != ours:
        if any(part.scope == "after-instruction" for part in theirs.parts):
            raise UsageError(
                f"--scope after-instruction means the instruction of one task, and --also {other} "
                f"is for {theirs.task.name}, not {ours}: choose another --scope"
            )
    return plan.with_changes(parts=(*plan.parts, *theirs.parts))


def _dosed(
    args: Namespace,
    lm: "LanguageModel",
    plan: "Plan",
    texts: list[str] | None,
    report: Report,
) -> "Plan":
    """The plan at the scale that `--dose` asks for, measured on `texts` (None: neutral ones)."""
    from saesteer.steering import Budget, dose_plan

    found = dose_plan(lm, plan, Budget(*args.dose), texts=texts, progress=report)
    report.say(
        f"--dose {found.target.kind}={found.target.limit:g}: scale {found.plan.scale:.4g} costs "
        f"{found.cost:.3g} nats a token, relative dose {figure(found.damage.relative_dose, 3)}"
    )
    return found.plan


def _generation(args: Namespace) -> dict[str, Any]:
    """The arguments of `generate_steered` and `generate_beside` that flags set."""
    return {
        "chat": args.chat,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed or 0,
        "batch_size": args.batch_size,
        "include_first": args.include_first,
        "include_template": args.include_template,
        "exclude_special": args.exclude_special,
        "force": args.force,
    }


def _values(plan: "Plan", name: str) -> str:
    """The different values that a field has in the parts of a plan."""
    return " and ".join(dict.fromkeys(str(getattr(part, name)) for part in plan.parts))


_GIGANTIC = 3.0
"""Relative doses above this are said: the edit is then most of what the residual is made of."""


def _warn_of_gigantic_doses(rows: list[Document], report: Report) -> None:
    """Say that an edit is longer than any residual. Raises UserError where it has overflowed."""
    largest = max((row["relative_dose"] or 0.0 for row in rows), default=0.0)
    if not math.isfinite(largest):
        raise UserError(
            "the edit is longer than float32 can hold, and what it gives is no answer: give a "
            "smaller --scale, or smaller values"
        )
    if largest > _GIGANTIC:
        report.warn(
            f"relative dose {figure(largest, 3)}: the edit is that many times as long as the "
            "residual it is added to, further than the model ever goes; a smaller --scale is safer"
        )


def _add_other_ways(
    args: Namespace,
    texts: list[str],
    lm: "LanguageModel",
    plan: "Plan | None",
    rows: list[Document],
    report: Report,
) -> None:
    """Put the answers of the other ways into the rows."""
    from saesteer.steering import generate_beside

    found = generate_beside(
        lm,
        texts,
        args.beside,
        plan=plan,
        sampled=_reply_config(args),
        progress=report,
        **_generation(args),
    )
    for i, row in enumerate(rows):
        row["beside"] = {
            way: {
                "completion": answers[i].completion,
                "tokens_touched": answers[i].tokens_touched,
                "relative_dose": answers[i].relative_dose,
            }
            for way, answers in found.items()
        }


def _explained(
    args: Namespace,
    texts: list[str],
    lm: "LanguageModel",
    plan: "Plan",
    sae: "SAE | None",
) -> "list[LatentChange]":
    from saesteer.steering import read_back

    return read_back(
        lm,
        plan,
        texts,
        sae=sae,
        max_new_tokens=args.max_new_tokens,
        chat=args.chat,
        batch_size=args.batch_size,
        force=args.force,
    )


def _generate(
    args: Namespace,
    texts: list[str],
    lm: "LanguageModel",
    plan: "Plan | None",
    sae: "SAE | None",
    report: Report,
) -> list[Document]:
    from saesteer.steering.hooking.generation import generate_steered

    passes = 2 if args.baseline and plan is not None else 1
    expected = passes * len(texts) * args.max_new_tokens
    done = 0

    def on_batch(new_tokens: int) -> None:
        nonlocal done
        done += new_tokens
        report("generate", done, max(expected, done + 1), "new tokens")

    on_batch(0)
    answers = generate_steered(
        lm,
        texts,
        plan,
        sae=sae,
        baseline=args.baseline,
        progress=on_batch,
        **_generation(args),
    )
    report("generate", done, done, "new tokens")
    rows = []
    for prompt_number, answer in enumerate(answers, 1):
        row = {
            "prompt": answer.prompt,
            "completion": answer.completion,
            "tokens_touched": answer.tokens_touched,
            "relative_dose": answer.relative_dose,
        }
        if args.baseline:
            row["baseline"] = answer.baseline
        rows.append(row)
        if plan is None or answer.tokens_touched:
            continue
        if answer.tokens_gated_off and plan.when is not None:
            report.warn(
                f"the plan's condition ({plan.when.source}) or its gates left prompt "
                f"{prompt_number} alone"
            )
        elif answer.tokens_gated_off:
            report.warn(f"--gate {_values(plan, 'gate')} stayed closed for prompt {prompt_number}")
        else:
            report.warn(
                f"--scope {_values(plan, 'scope')} touched no token of prompt {prompt_number}"
            )
    _warn_of_gigantic_doses(rows, report)
    touched = sum(answer.tokens_touched for answer in answers)
    if plan is not None and touched and not any(answer.tokens_changed for answer in answers):
        report.warn(
            f"--method {_values(plan, 'method')} changed none of the {touched} tokens it touched "
            "(every relative dose is 0): choose another --method, or other latents"
        )
    return rows
