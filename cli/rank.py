"""`saesteer rank`: find the latents that carry an instruction, and write a plan for them."""

import argparse
from argparse import Namespace
from functools import partial
from typing import TYPE_CHECKING, Any

from saesteer.checkpoints.errors import UsageError, none_of
from saesteer.cli.flags import (
    add_common,
    add_latent_pages,
    add_open,
    add_sae,
    add_thinking,
    check_open,
    default,
    given,
    need,
)
from saesteer.cli.inputs import check_latent_pages, open_model, open_sae, reserved, take_folder
from saesteer.cli.output import command_line, print_json, write_run
from saesteer.cli.parser import VerbParser
from saesteer.cli.progress import reporting
from saesteer.cli.rank_report import print_ranking
from saesteer.cli.values import count, counts, names, number, numbers
from saesteer.steering.ranking.config import RankConfig

if TYPE_CHECKING:
    from saesteer.steering.tasks.task import Task

EXAMPLE = (
    "saesteer rank --model smollm2-135m-instruct --sae runs/sae --task french --read reply "
    "-o runs/plan"
)
NEEDED = "--sae DIR (--task NAME | --instruction TEXT --contents FILE)"

FEW_CONTENTS = 10
"""With fewer contents than this a warning is given."""


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    usual = partial(default, RankConfig)
    what = parser.add_argument_group("model and SAE")
    add_sae(what)
    task = parser.add_argument_group("instruction: --task, or --instruction with --contents")
    task.add_argument("--task", metavar="NAME/FILE", help="a built-in task, or a task.yaml")
    task.add_argument("--instruction", metavar="TEXT", help="an instruction in your own words")
    task.add_argument(
        "--contents",
        metavar="FILE",
        help="texts that the instruction is applied to: .jsonl with `text` (and `split`), or one "
        "text per line; without `split` they are divided at random: 50 %% train (the only ones "
        "ranked with), 12 %% dev, 38 %% test",
    )
    read = parser.add_argument_group("ranking")
    read.add_argument(
        "--read",
        metavar="WHERE",
        help="where latents are read: at the last token of the user's text (last), the last prompt "
        "token (template), the tokens of the instruction (span), or the model's own replies "
        f"(reply) {usual('read')}",
    )
    read.add_argument(
        "--by",
        metavar="SCORE",
        help="score to rank by. How well a latent detects the instruction: saif, rate, logodds, "
        "mcnemar, meandiff, cohen, welch, paired-t, auroc, mi, corr. What its direction does to "
        "the output: lens, effect, atp, output. Both: fused. Steering with each latent of a "
        "shortlist: causal (default: saif; rate with --read reply)",
    )
    read.add_argument(
        "--drop",
        type=names,
        metavar="FILTER,...",
        help="remove latents: dense (active almost everywhere), template (active at the chat "
        "template and attention sinks), duplicate (nearly the direction of a better latent), fdr "
        "(not distinguishable from chance) (default: none; the output counts what each would "
        "remove)",
    )
    read.add_argument(
        "--max-fdr",
        type=number,
        metavar="Q",
        help=f"largest false discovery rate that --drop fdr keeps {usual('max_fdr')}",
    )
    read.add_argument(
        "--shuffles",
        type=count,
        metavar="N",
        help="rankings with shuffled labels, which show what chance would find; 0: none "
        f"{usual('shuffles')}",
    )
    read.add_argument(
        "--position",
        metavar="WHERE",
        help=f"put the instruction after the content (post) or before it (pre) {usual('position')}",
    )
    read.add_argument("--pool", metavar="HOW", help=f"pool a span by max or mean {usual('pool')}")
    read.add_argument(
        "--rank-contents",
        type=count,
        metavar="N",
        help=f"contents of the train split to use {usual('contents')}",
    )
    read.add_argument(
        "--all-replies",
        action="store_true",
        help="with --read reply: also use instructed replies that fail the task's check",
    )
    read.add_argument(
        "--reply-variants",
        type=count,
        metavar="N",
        help=f"with --read reply: wordings of the instruction to answer {usual('reply_variants')}",
    )
    read.add_argument(
        "--max-new-tokens",
        type=count,
        metavar="N",
        help=f"with --read reply: longest reply {usual('max_new_tokens')}",
    )
    read.add_argument(
        "--temperature",
        type=number,
        metavar="T",
        help=f"with --read reply: sampling temperature {usual('temperature')}",
    )
    read.add_argument(
        "--top-p",
        type=number,
        metavar="P",
        help="with --read reply: sample from the most likely tokens of total probability P "
        f"{usual('top_p')}",
    )
    read.add_argument(
        "--effect-contents",
        type=count,
        metavar="N",
        help="with effect, atp, fused and causal: contents whose answers gradients are taken on "
        f"{usual('effect_contents')}",
    )
    read.add_argument(
        "--candidates",
        type=count,
        metavar="N",
        help="with output, fused and causal: how many of the best latents are tried "
        f"{usual('candidates')}",
    )
    read.add_argument(
        "--shortlist",
        type=count,
        metavar="N",
        help=f"with causal: how many latents to steer with, best by fused {usual('shortlist')}",
    )
    read.add_argument(
        "--causal-contents",
        type=count,
        metavar="N",
        help=f"with causal: train contents to answer while steering {usual('causal_contents')}",
    )
    read.add_argument(
        "--doses",
        type=numbers,
        metavar="X,...",
        help="with causal: doses ||delta|| / ||h|| to try, the same for every latent "
        f"{usual('doses')}",
    )
    read.add_argument(
        "--batch-size",
        type=count,
        metavar="N",
        help=f"texts per batch {usual('batch_size')}",
    )
    read.add_argument(
        "--max-norm-ratio",
        type=number,
        metavar="X",
        help="leave out attention sinks: activations whose norm exceeds X times the running median "
        f"{usual('max_norm_ratio')}",
    )
    read.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="send texts through the chat template (default: when there is one)",
    )
    add_thinking(read)
    plan = parser.add_argument_group("plan")
    plan.add_argument("--top", type=count, metavar="N", help="latents in the plan (default: 15)")
    plan.add_argument(
        "--method", metavar="NAME", help="method of steering, see steer (default: add)"
    )
    plan.add_argument(
        "--unit", metavar="NAME", help="unit of the doses: raw, sigma, max or rel (default: raw)"
    )
    plan.add_argument(
        "--scale", type=number, metavar="X", help="alpha = scale * (mu + beta * sigma) (default: 1)"
    )
    plan.add_argument(
        "--beta",
        type=number,
        metavar="X",
        help="standard deviations above mu, see --scale (default: 0)",
    )
    plan.add_argument(
        "--scope", metavar="WHERE", help="positions to steer, see steer (default: generation)"
    )
    plan.add_argument(
        "--explain",
        type=counts,
        nargs="?",
        const=(),
        metavar="ID,...",
        help="report everything known about the latents of the plan, or about these (default: off)",
    )
    add_latent_pages(plan)
    add_open(plan)
    add_common(
        parser,
        out="folder for plan.yaml, plan.safetensors, ranking.json, ranking.html and "
        "scores.safetensors, which holds every score of every latent (default: print only)",
        force="accept another model than the SAE's; replace an earlier plan in --out",
    )


def run(args: Namespace) -> int:
    """Rank, print the best latents, and write the plan."""
    need(args, "--sae", "the SAE whose latents are ranked, a folder or RELEASE:ID")
    _check_task_flags(args)
    check_latent_pages(args)
    check_open(args)
    with (
        reserved(args, model=args.model, sae=args.sae, contents=args.contents, task=args.task),
        reporting(args) as report,
    ):
        from saesteer.steering import plan_from_ranking, rank, ranking_document, save_ranking
        from saesteer.steering.checks.words import keeping_thoughts

        config = RankConfig(**given(args, RankConfig, contents="rank_contents"))
        top = _plan_settings(args)
        task = _open_task(args)
        sae = open_sae(args, report)
        _check_explain(args, sae.spec.d_sae)
        lm = open_model(args, report, name=sae.spec.model_name)
        sae = sae.to(lm.device)
        with keeping_thoughts(not args.strip_thinking):
            ranking = rank(
                lm,
                sae,
                task,
                config,
                layer=args.layer,
                site=args.site,
                force=args.force,
                progress=report,
            )
        plan = plan_from_ranking(lm, sae, ranking, **top)
        if args.out is None:
            document = ranking_document(lm, sae, ranking, plan, args.explain)
        else:
            from saesteer.steering.reports.ranking_page import save_ranking_page

            folder = take_folder(args)
            document = save_ranking(
                folder, lm, sae, ranking, plan, args.explain, args.latent_pages or ()
            )
            save_ranking_page(folder, document, command_line())
            write_run(folder, "rank", vars(args), model=document["model"], sae=document["sae"])
        used, total = document["contents_used"]
        if used < FEW_CONTENTS:
            report.warn(
                f"ranked with {used} of {total} contents, which is few: {FEW_CONTENTS} or "
                "more are better (of --contents without splits, half are kept for dev and test)"
            )
    if args.json:
        print_json(document)
    else:
        print_ranking(args, document)
    return 0


def _check_task_flags(args: Namespace) -> None:
    if (args.task is None) == (args.instruction is None):
        came = "neither" if args.task is None else "both"
        raise UsageError(
            f"--task NAME, or --instruction TEXT with --contents FILE: give one, got {came}"
        )
    if (args.instruction is None) != (args.contents is None):
        raise UsageError("--instruction and --contents belong together: give both")


def _plan_settings(args: Namespace) -> dict[str, Any]:
    """The plan's settings, checked here so that errors come before the ranking runs."""
    from saesteer.steering.hooking.scope import parse_scope
    from saesteer.steering.plans.methods import METHODS, UNITS

    for flag, value, allowed in (
        ("--method", args.method, METHODS),
        ("--unit", args.unit, UNITS),
    ):
        if value is not None and value not in allowed:
            raise none_of(flag, allowed, value)
    if args.scope is not None:
        parse_scope(args.scope)
    if args.top is not None and args.top < 1:
        raise UsageError(f"--top must be at least 1, got {args.top}")
    settings = {
        name: getattr(args, name) for name in ("top", "method", "unit", "scale", "beta", "scope")
    }
    return {name: value for name, value in settings.items() if value is not None}


def _open_task(args: Namespace) -> "Task":
    from saesteer.steering.tasks.task import load_task, task_from_instruction

    if args.task is not None:
        return load_task(args.task)
    return task_from_instruction(args.instruction, args.contents, seed=args.seed or 0)


def _check_explain(args: Namespace, d_sae: int) -> None:
    for latent in args.explain or ():
        if not 0 <= latent < d_sae:
            raise UsageError(
                f"--explain {latent} is out of range: the SAE has latents 0..{d_sae - 1}"
            )
