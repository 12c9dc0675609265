"""`saesteer steer`: texts in, steered texts out."""

import argparse
import dataclasses
from argparse import Namespace
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UsageError
from saesteer.cli.flags import SITE_HELP, add_common, add_model
from saesteer.cli.inputs import open_model, open_sae, read_prompts, reserved, take_folder
from saesteer.cli.output import number as figure
from saesteer.cli.output import paint, print_json, write_run
from saesteer.cli.parser import Repeated, VerbParser
from saesteer.cli.progress import Report, reporting
from saesteer.cli.values import count, latents, number, one_layer

EXAMPLE = 'saesteer steer --plan runs/plan -p "The weather is nice today." --baseline'


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    what = parser.add_argument_group("what steers: --plan, or --sae with --latents")
    add_model(what, "(default: the one the plan or the SAE names)")
    what.add_argument("--plan", metavar="FILE", help="a plan.yaml, or the folder that holds it")
    what.add_argument(
        "--also", action=Repeated, metavar="FILE",
        help="a further plan, which edits what the one before left; repeatable",
    )  # fmt: skip
    what.add_argument(
        "--sae", metavar="DIR",
        help="folder in SAELens format, or RELEASE:ID of sae_lens; with --plan: where the plan's "
        "SAE lies now, for methods that read latents",
    )  # fmt: skip
    what.add_argument(
        "--latents", type=latents, metavar="ID:V,...",
        help="latents by number, such as 9143:1.2,412:0.8; method add adds V * W_dec[ID] "
        "(ablate and project take ids alone)",
    )  # fmt: skip
    what.add_argument(
        "--layer", type=one_layer, metavar="L",
        help="with --latents: the block it reads (default: the SAE's own)",
    )  # fmt: skip
    what.add_argument(
        "--site", metavar="SITE", help=f"with --latents: {SITE_HELP} (default: the SAE's own)"
    )
    how = parser.add_argument_group("how; with --plan the defaults are the plan's")
    how.add_argument(
        "--method", metavar="NAME",
        help="add, add-keep-norm, set, min, max, scale, ablate or project (default with --latents: "
        "add)",
    )  # fmt: skip
    how.add_argument(
        "--unit", metavar="NAME",
        help="raw, sigma, max or rel: what doses are counted in (default with --latents: raw)",
    )  # fmt: skip
    how.add_argument(
        "--scale", type=number, metavar="X",
        help="multiplies every dose (default with --latents: 1)",
    )  # fmt: skip
    how.add_argument(
        "--beta", type=number, metavar="X",
        help="with --plan: dose mu + beta * sigma (default: the plan's)",
    )  # fmt: skip
    how.add_argument(
        "--scope", metavar="WHERE",
        help="positions to steer: generation, generated, prompt, all, last-prompt, first:N, "
        "span:A-B, after-instruction or assistant (default with --latents: generation)",
    )  # fmt: skip
    how.add_argument(
        "--schedule", metavar="HOW",
        help="strength over the new tokens: constant, first:N, linear:N or decay:OMEGA,K "
        "(default with --latents: constant)",
    )  # fmt: skip
    how.add_argument(
        "--gate", metavar="IF",
        help="edit only where latents say so: '412 > 3 & !(77 > 1)', '412 > 3 : 1' (on above 3, "
        "off again at 1), 'prompt: 412 > 3' (decided once)",
    )  # fmt: skip
    how.add_argument(
        "--exclude-special", action="store_true", help="every scope: leave out special tokens"
    )
    how.add_argument(
        "--include-first", action="store_true", help="scopes prompt and all: position 0 too"
    )
    how.add_argument(
        "--include-template", action="store_true",
        help="scopes prompt and all: template and special tokens too",
    )  # fmt: skip
    text = parser.add_argument_group("prompts")
    text.add_argument(
        "-p", "--prompt", action=Repeated, metavar="TEXT", help="a prompt; repeatable"
    )
    text.add_argument(
        "--prompts", metavar="FILE",
        help="prompts from .jsonl with `prompt`, from .txt one a line, or from stdin (-)",
    )  # fmt: skip
    text.add_argument(
        "--chat", action=argparse.BooleanOptionalAction,
        help="send prompts through the chat template (default: when there is one)",
    )  # fmt: skip
    work = parser.add_argument_group("generation")
    work.add_argument(
        "--max-new-tokens", type=count, default=64, metavar="N", help="longest reply (default: 64)"
    )
    work.add_argument(
        "--temperature", type=number, default=0.0, metavar="T",
        help="of sampling; 0 is greedy (default: 0)",
    )  # fmt: skip
    work.add_argument(
        "--top-p", type=number, default=1.0, metavar="P", help="of sampling (default: 1)"
    )
    work.add_argument(
        "--batch-size", type=count, default=16, metavar="N", help="prompts at once (default: 16)"
    )
    work.add_argument(
        "--baseline", action="store_true",
        help="generate the unsteered text too; alone, without a plan, only that",
    )  # fmt: skip
    add_common(
        parser,
        out="folder for results.jsonl (default: print only)",
        force="steer other weights than the plan's or the SAE's; replace results in --out",
    )


def run(args: Namespace) -> int:
    """Generate, and print one block or one JSON line for each prompt."""
    _check_flags(args)
    texts = read_prompts(args)
    with (
        reserved(args, model=args.model, plan=args.plan, sae=args.sae, prompts=args.prompts),
        reporting(args) as report,
    ):
        lm, plan, sae = _open(args, report)
        rows = _generate(args, texts, lm, plan, sae, report)
        if args.out is not None:
            _write(take_folder(args), args, lm, rows)
    if args.json:
        for row in rows:
            print_json(row, one_a_line=True)
    else:
        _print_blocks(args, rows)
    return 0


def _check_flags(args: Namespace) -> None:
    """Refuse what can never work, before anything is loaded."""
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
        _refuse(args, "layer", "site", "method", "unit", "scale", "beta", "scope", "schedule",
                "gate", "also", reason="needs --plan, or --sae with --latents")  # fmt: skip
    if args.plan is not None:
        _refuse(args, "site", reason="is for --latents: a plan says where it steers")
    if args.latents is not None:
        _refuse(args, "beta", reason="needs a plan's mu and sigma; with --latents use --scale")
    if args.scale == 0:
        raise UsageError(
            "--scale 0 would steer nothing: leave out the plan and give --baseline for the "
            "unsteered text, or give --baseline beside another --scale"
        )


def _refuse(args: Namespace, *names: str, reason: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise UsageError(f"--{name} {reason}")


def _open(args: Namespace, report: Report) -> tuple[Any, Any, Any]:
    """The model, the plan (None: unsteered) and the SAE of `--sae`."""
    from saesteer.sae.hooks import sae_hook_point
    from saesteer.steering import load_plan, plan_from_latents, with_gate
    from saesteer.steering.plan import parse_latents

    changes = {
        name: value
        for name in ("method", "unit", "scale", "beta", "scope", "schedule")
        if (value := getattr(args, name)) is not None
    }
    if args.plan is not None:
        plan = dataclasses.replace(load_plan(args.plan), **changes)
        if plan.scale == 0:
            raise UsageError(
                f"--plan {args.plan} has scale 0 and would steer nothing: give another --scale"
            )
        if args.layer is not None and args.layer % plan.model.n_layers != plan.layer:
            raise UsageError(
                f"--layer {args.layer} conflicts with --plan {args.plan}, which steers layer "
                f"{plan.layer}: leave --layer out"
            )
        sae = None if args.sae is None else open_sae(args, report)
        if args.gate is not None:
            plan = with_gate(plan, args.gate, sae)
        return open_model(args, report, name=plan.model.name), plan, sae
    if args.sae is None:
        return open_model(args, report), None, None
    values = parse_latents(args.latents)
    sae = open_sae(args, report)
    lm = open_model(args, report, name=sae.spec.model_name)
    sae_hook_point(sae, lm, layer=args.layer, site=args.site, force=args.force)
    plan = plan_from_latents(lm, sae, args.layer, values, site=args.site, **changes)
    if args.gate is not None:
        plan = with_gate(plan, args.gate, sae)
    return lm, plan, sae.to(lm.device)


def _generate(
    args: Namespace, texts: list[str], lm: Any, plan: Any, sae: Any, report: Report
) -> list[dict[str, Any]]:
    from saesteer.steering.applying import generate_steered

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
        plan if not args.also else [plan, *args.also],
        chat=args.chat,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed or 0,
        batch_size=args.batch_size,
        include_first=args.include_first,
        include_template=args.include_template,
        exclude_special=args.exclude_special,
        sae=sae,
        force=args.force,
        baseline=args.baseline,
        progress=on_batch,
    )
    report("generate", done, done, "new tokens")
    rows = []
    for number_, answer in enumerate(answers, 1):
        row = {
            "prompt": answer.prompt,
            "completion": answer.completion,
            "tokens_touched": answer.tokens_touched,
            "relative_dose": answer.relative_dose,
        }
        if args.baseline:
            row["baseline"] = answer.baseline
        if answer.tokens_gated_off and not answer.tokens_touched:
            report.warn(f"--gate {plan.gate!r} stayed closed for prompt {number_}")
        elif plan is not None and not answer.tokens_touched:
            report.warn(f"--scope {plan.scope} touched no token of prompt {number_}")
        rows.append(row)
    touched = sum(answer.tokens_touched for answer in answers)
    if touched and not any(answer.tokens_changed for answer in answers):
        report.warn(
            f"--method {plan.method} changed none of the {touched} tokens it touched (every "
            "relative dose is 0): choose another --method, or other latents"
        )
    return rows


def _write(folder: Path, args: Namespace, lm: Any, rows: list[dict[str, Any]]) -> None:
    import json

    from saesteer.checkpoints.files import plain, write_text

    lines = (json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows)
    write_text(folder / "results.jsonl", "".join(lines))
    write_run(folder, "steer", vars(args), model={"name": lm.name, "hash": lm.fingerprint})


def _print_blocks(args: Namespace, rows: list[dict[str, Any]]) -> None:
    steered = args.plan is not None or args.sae is not None
    for row in rows:
        _print_labelled("prompt", row["prompt"], "dim")
        if "baseline" in row:
            _print_labelled("unsteered", row["baseline"], "bold")
        if steered:
            _print_labelled("steered", row["completion"], "green")
            print(
                f"{row['tokens_touched']} tokens touched, relative dose "
                f"{figure(row['relative_dose'], 3)}"
            )
        print()
    if args.out is not None:
        print(f"written to {args.out / 'results.jsonl'}")


def _print_labelled(label: str, text: str, colour: str) -> None:
    """A label, and a text whose further lines are indented below its first."""
    indented = ("\n" + " " * 11).join(text.splitlines() or ["(nothing)"])
    print(f"{paint(label.ljust(10), colour)} {indented}")
