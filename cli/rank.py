"""`saesteer rank`: which latents carry an instruction, and a plan that steers with them."""

import argparse
from argparse import Namespace
from typing import Any

from saesteer.checkpoints.errors import UsageError
from saesteer.cli.flags import add_common, add_sae, need
from saesteer.cli.inputs import open_model, open_sae, reserved, take_folder
from saesteer.cli.output import print_json, write_run
from saesteer.cli.parser import VerbParser
from saesteer.cli.progress import reporting
from saesteer.cli.rank_report import print_ranking
from saesteer.cli.values import count, counts, names, number, numbers

EXAMPLE = (
    "saesteer rank --model smollm2-135m-instruct --sae runs/sae --task french --read reply "
    "-o runs/plan"
)

FEW_CONTENTS = 10
"""Fewer contents than these are worth a warning."""

# Fields of RankConfig by the flag that sets them (that module needs torch; help must not).
_RANK_FIELDS = {
    "by": "by",
    "read": "read",
    "position": "position",
    "pool": "pool",
    "drop": "drop",
    "max_fdr": "max_fdr",
    "shuffles": "shuffles",
    "rank_contents": "contents",
    "reply_variants": "reply_variants",
    "effect_contents": "effect_contents",
    "candidates": "candidates",
    "shortlist": "shortlist",
    "causal_contents": "causal_contents",
    "doses": "doses",
    "max_new_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "seed": "seed",
    "batch_size": "batch_size",
    "max_norm_ratio": "max_norm_ratio",
    "chat": "chat",
}


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    what = parser.add_argument_group("model and SAE")
    add_sae(what)
    task = parser.add_argument_group("instruction: --task, or --instruction with --contents")
    task.add_argument("--task", metavar="NAME/FILE", help="a built-in task, or a task.yaml")
    task.add_argument("--instruction", metavar="TEXT", help="an instruction in your own words")
    task.add_argument(
        "--contents", metavar="FILE",
        help="what the instruction is applied to: .jsonl with `text` (and `split`), or one a "
        "line; rows without `split` are dealt half to train, which alone is ranked with, 12 %% to "
        "dev and 38 %% to test",
    )  # fmt: skip
    read = parser.add_argument_group("ranking")
    read.add_argument(
        "--read", metavar="WHERE",
        help="last token of the user's text (last), last prompt token (template), the instruction "
        "(span), the model's own replies (reply) (default: last)",
    )  # fmt: skip
    read.add_argument(
        "--by", metavar="SCORE",
        help="what tells instructed texts apart: saif, rate, logodds, mcnemar, meandiff, cohen, "
        "welch, paired-t, auroc, mi, corr; what a latent makes the model say: lens, effect, atp, "
        "output; both: fused; steering with each of a shortlist: causal (default: saif; rate with "
        "--read reply)",
    )  # fmt: skip
    read.add_argument(
        "--drop", type=names, metavar="FILTER,...",
        help="take latents out: dense (on almost everywhere), template (on at the template and "
        "attention sinks), duplicate (a better latent's direction), fdr (not told from chance) "
        "(default: none, but what each would take out is said)",
    )  # fmt: skip
    read.add_argument(
        "--max-fdr", type=number, metavar="Q",
        help="false discovery rate that --drop fdr lets pass (default: 0.05)",
    )  # fmt: skip
    read.add_argument(
        "--shuffles", type=count, metavar="N",
        help="rankings with shuffled labels, to show what chance finds; 0: none (default: 20)",
    )  # fmt: skip
    read.add_argument(
        "--position", metavar="WHERE",
        help="the instruction after the content (post) or before it (pre) (default: post)",
    )  # fmt: skip
    read.add_argument(
        "--pool", metavar="HOW", help="max or mean over a span (default: max)"
    )  # fmt: skip
    read.add_argument(
        "--rank-contents", type=count, metavar="N",
        help="contents of the train split to use (default: 48)",
    )  # fmt: skip
    read.add_argument(
        "--all-replies", action="store_true",
        help="with --read reply: count instructed replies that fail the task's check too",
    )  # fmt: skip
    read.add_argument(
        "--reply-variants", type=count, metavar="N",
        help="with --read reply: wordings that the model answers (default: 2)",
    )  # fmt: skip
    read.add_argument(
        "--max-new-tokens", type=count, metavar="N",
        help="with --read reply: longest reply (default: 40)",
    )  # fmt: skip
    read.add_argument(
        "--temperature", type=number, metavar="T",
        help="with --read reply: of sampling (default: 0.8)",
    )  # fmt: skip
    read.add_argument(
        "--top-p", type=number, metavar="P", help="with --read reply: of sampling (default: 0.95)"
    )
    read.add_argument(
        "--effect-contents", type=count, metavar="N",
        help="with effect, atp, fused and causal: contents whose answers give the gradients "
        "(default: 16)",
    )  # fmt: skip
    read.add_argument(
        "--candidates", type=count, metavar="N",
        help="with output, fused and causal: latents to try, the best so far (default: 100)",
    )  # fmt: skip
    read.add_argument(
        "--shortlist", type=count, metavar="N",
        help="with causal: latents to steer with, the best by fused (default: 20)",
    )  # fmt: skip
    read.add_argument(
        "--causal-contents", type=count, metavar="N",
        help="with causal: train contents to steer (default: 8)",
    )  # fmt: skip
    read.add_argument(
        "--doses", type=numbers, metavar="X,...",
        help="with causal: relative doses, the same for every latent (default: 0.3,0.6)",
    )  # fmt: skip
    read.add_argument("--batch-size", type=count, metavar="N", help="texts at once (default: 32)")
    read.add_argument(
        "--max-norm-ratio", type=number, metavar="X",
        help="leave out attention sinks: rows longer than X times the running median "
        "(default: 10.0)",
    )  # fmt: skip
    read.add_argument(
        "--chat", action=argparse.BooleanOptionalAction,
        help="send texts through the chat template (default: when there is one)",
    )  # fmt: skip
    plan = parser.add_argument_group("plan")
    plan.add_argument("--top", type=count, metavar="N", help="latents in the plan (default: 15)")
    plan.add_argument("--method", metavar="NAME", help="how to steer with them (default: add)")
    plan.add_argument("--unit", metavar="NAME", help="raw, sigma, max or rel (default: raw)")
    plan.add_argument(
        "--scale", type=number, metavar="X",
        help="alpha = scale * (mu + beta * sigma) (default: 1)",
    )  # fmt: skip
    plan.add_argument("--beta", type=number, metavar="X", help="see --scale (default: 0)")
    plan.add_argument(
        "--scope", metavar="WHERE", help="positions to steer, see steer (default: generation)"
    )
    plan.add_argument(
        "--explain", type=counts, nargs="?", const=(), metavar="ID,...",
        help="report all that is known of the top latents, or of these (default: not)",
    )  # fmt: skip
    add_common(
        parser,
        out="folder for plan.yaml, plan.safetensors, ranking.json and scores.safetensors, which "
        "holds every score of every latent (default: print only)",
        force="use another model than the SAE's; replace an earlier plan in --out",
    )


def run(args: Namespace) -> int:
    """Rank, print the best latents, and write the plan."""
    need(args, "--sae", "the SAE whose latents are ranked, a folder or RELEASE:ID")
    _check_task_flags(args)
    with (
        reserved(args, model=args.model, sae=args.sae, contents=args.contents, task=args.task),
        reporting(args) as report,
    ):
        from saesteer.steering import save_plan
        from saesteer.steering.ranking.rank import RankConfig, plan_from_ranking, rank

        given = {field: getattr(args, flag) for flag, field in _RANK_FIELDS.items()}
        config = RankConfig(
            all_replies=args.all_replies,
            **{field: value for field, value in given.items() if value is not None},
        )
        top = _plan_settings(args)
        task = _open_task(args)
        sae = open_sae(args, report)
        _check_explain(args, sae.spec.d_sae)
        lm = open_model(args, report, name=sae.spec.model_name)
        sae = sae.to(lm.device)
        ranking = rank(
            lm, sae, task, config, layer=args.layer, site=args.site, force=args.force,
            progress=report,
        )  # fmt: skip
        plan = plan_from_ranking(lm, sae, ranking, **top)
        document = _document(lm, sae, ranking, plan, args)
        used, given_ = document["contents_used"]
        if used < FEW_CONTENTS:
            report.warn(
                f"ranked with {used} of {given_} contents, which is few: {FEW_CONTENTS} or more "
                "are better (of --contents without `split`, half are kept for dev and test)"
            )
        if args.out is not None:
            folder = take_folder(args)
            document["plan"] = save_plan(plan, folder)
            _write(folder, args, document, ranking)
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
    """Settings of the plan, refused now rather than after the ranking."""
    from saesteer.steering.hooking.scope import parse_scope
    from saesteer.steering.plans.methods import METHODS, UNITS

    for flag, value, allowed in (
        ("--method", args.method, METHODS),
        ("--unit", args.unit, UNITS),
    ):
        if value is not None and value not in allowed:
            raise UsageError(f"{flag} must be one of {', '.join(allowed)}, got {value!r}")
    if args.scope is not None:
        parse_scope(args.scope)
    if args.top is not None and args.top < 1:
        raise UsageError(f"--top must be at least 1, got {args.top}")
    settings = {
        name: getattr(args, name) for name in ("top", "method", "unit", "scale", "beta", "scope")
    }
    return {name: value for name, value in settings.items() if value is not None}


def _open_task(args: Namespace) -> Any:
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


def _document(lm: Any, sae: Any, ranking: Any, plan: Any, args: Namespace) -> dict[str, Any]:
    """What `--json` prints and `ranking.json` holds."""
    from saesteer.steering.ranking.detection_scores import significance_of
    from saesteer.steering.ranking.rank import lens_tokens

    config = ranking.config
    lens = {latent.id: list(latent.lens) for latent in plan.latents}
    document = {
        "schema_version": 1,
        "task": {"name": ranking.task.name, "hash": ranking.task.hash},
        "model": {"name": lm.name, "hash": lm.fingerprint},
        "sae": {"source": sae.source, "sha256": sae.sha256},
        "layer": ranking.point.layer,
        "site": ranking.point.site,
        "by": config.resolved_by,
        "read": config.read,
        "position": config.position,
        "positives": ranking.positives,
        "negatives": ranking.negatives,
        "replies_used": ranking.replies_used,
        "test": significance_of(config.resolved_by),
        "discoveries": {
            "max_fdr": config.max_fdr,
            "latents": int((ranking.q <= config.max_fdr).sum()),
        },
        "dropped": list(config.drop),
        "filters": ranking.dropped(),
        "stability": ranking.stability.summary(),
        "overlap": ranking.overlap(),
        "shuffled": None if ranking.shuffled is None else ranking.shuffled.summary(),
        "unsteered": _unsteered(ranking),
        "contents_used": [
            min(config.contents, len(ranking.task.contents["train"])),
            sum(len(texts) for texts in ranking.task.contents.values()),
        ],
        "excluded": ranking.excluded,
        "latents": [
            {"rank": place, **ranking.explain(i), "lens": lens[i]}
            for place, i in enumerate(plan.ids, 1)
        ],
        "plan": None,
    }
    if args.explain is not None:
        document["explain"] = [
            {**ranking.explain(i), "lens": lens.get(i) or lens_tokens(lm, sae.W_dec[i])}
            for i in args.explain or plan.ids
        ]
    return document


def _unsteered(ranking: Any) -> dict[str, int] | None:
    """How the unsteered model did on the contents of the shortlist."""
    plain = next((trial for trial in ranking.trials if trial.latent is None), None)
    return plain and {"successes": plain.successes, "n": plain.n}


def _write(folder: Any, args: Namespace, document: dict[str, Any], ranking: Any) -> None:
    from saesteer.checkpoints.files import write_json, write_tensors

    write_json(folder / "ranking.json", document)
    columns = {**ranking.columns, "p": ranking.p, "q": ranking.q, "mu": ranking.mu,
               "sigma": ranking.sigma, "control_rate": ranking.control_rate,
               "template_rate": ranking.template_rate}  # fmt: skip
    write_tensors(folder / "scores.safetensors", columns)
    write_run(folder, "rank", vars(args), model=document["model"], sae=document["sae"])
