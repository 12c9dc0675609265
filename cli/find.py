"""`saesteer find`: search layers, phases, directions or latents, and doses for one task."""

from argparse import Namespace
from dataclasses import replace
from typing import TYPE_CHECKING

from saesteer.checkpoints.errors import UsageError
from saesteer.cli.flags import add_answering, add_common, add_model, add_open, check_open, need
from saesteer.cli.inputs import open_model, reserved, take_folder
from saesteer.cli.output import (
    Document,
    duration,
    print_json,
    print_next,
    print_page,
    print_table,
    write_run,
)
from saesteer.cli.output import number as figure
from saesteer.cli.parser import Repeated, VerbParser
from saesteer.cli.progress import reporting
from saesteer.cli.values import count, number

if TYPE_CHECKING:
    from saesteer.steering.finding.find import FindConfig

EXAMPLE = (
    "saesteer find --model smollm2-135m-instruct --task question --budget-minutes 20 -o runs/found"
)
NEEDED = "--task NAME"

_GRADES = ("follows", "fluent", "faithful", "strict")


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    what = parser.add_argument_group("what is searched for")
    add_model(what)
    what.add_argument("--task", metavar="NAME/FILE", help="a built-in task, or a task.yaml")
    what.add_argument(
        "--sae",
        action=Repeated,
        nargs="+",
        metavar="DIR",
        help="SAEs of some layers, after a block each (resid_post): a plan in their latents is "
        "found too; repeatable",
    )
    what.add_argument(
        "--when",
        action="store_true",
        help="act only on prompts like the task's contents: a condition on the prompt is chosen, "
        "and unrelated prompts are left as they are",
    )
    what.add_argument(
        "--narrow",
        action="store_true",
        help="budget the damage on unrelated prompts, as for a plan with --when",
    )
    what.add_argument(
        "--side-by-side",
        action="store_true",
        help="report each phase alone, random directions of the same lengths, and the plan "
        "together with the instruction as well",
    )
    spent = parser.add_argument_group("budget and sizes")
    spent.add_argument(
        "--budget-minutes",
        type=number,
        default=20.0,
        metavar="MIN",
        help="minutes for everything, the report on test contents included (default: 20)",
    )
    spent.add_argument(
        "--train-contents",
        type=count,
        default=48,
        metavar="N",
        help="train contents that the model is read on (default: 48)",
    )
    spent.add_argument(
        "--dev-contents",
        type=count,
        default=24,
        metavar="N",
        help="development contents that settings are tried on (default: 24)",
    )
    spent.add_argument(
        "--n",
        type=count,
        default=40,
        metavar="N",
        help="test contents of the report, fewer where time is short (default: 40)",
    )
    spent.add_argument(
        "--quality-budget",
        type=number,
        default=0.15,
        metavar="X",
        help="largest loss of the rates fluent and faithful against the prompted answers (default: "
        "0.15)",
    )
    spent.add_argument(
        "--neutral-budget",
        type=number,
        default=0.1,
        metavar="NATS",
        help="with --when or --narrow: largest rise of the cross-entropy on unrelated prompts, in "
        "nats a token (default: 0.1)",
    )
    spent.add_argument(
        "--latents",
        type=count,
        default=64,
        metavar="N",
        help="most latents for each phase at each layer, with --sae (default: 64)",
    )
    add_answering(spent)
    add_open(spent)
    add_common(
        parser,
        out="folder for the plan, find.json and, with --sae, the plan in latents (default: print "
        "only)",
        force="replace an earlier search in --out",
    )


def run(args: Namespace) -> int:
    """Search, print what was tried and the report, write the plan."""
    need(args, "--task", "give a built-in task, such as french, or a task.yaml")
    check_open(args)
    saes = [name for names in args.sae or () for name in names]
    with reserved(args, sae=saes, task=args.task), reporting(args) as report:
        from saesteer.steering import find, load_task, save_found
        from saesteer.steering.checks.words import keeping_thoughts

        config = _config(args)
        task = load_task(args.task)
        lm = open_model(args, report)
        with keeping_thoughts(not args.strip_thinking):
            found = find(lm, task, saes, config, progress=report)
        for problem in found.problems:
            report.warn(f"over budget: {problem}")
        if args.out is None:
            document = found.document()
        else:
            folder = take_folder(args)
            document = save_found(folder, found)
            write_run(folder, "find", vars(args), model=document["model"])
    if args.json:
        print_json(document)
    else:
        _print(args, document)
    return 0


def _config(args: Namespace) -> "FindConfig":
    from saesteer.steering.finding.find import FindConfig

    usual = FindConfig()
    if not args.budget_minutes > 0:
        raise UsageError(f"--budget-minutes must be above 0, got {args.budget_minutes:g}")
    return replace(
        usual,
        budget_minutes=args.budget_minutes,
        read=replace(usual.read, contents=args.train_contents),
        search=replace(usual.search, rows=args.batch_size),
        dev=args.dev_contents,
        test=args.n,
        when=args.when,
        narrow=args.narrow,
        side_by_side=args.side_by_side,
        quality_budget=args.quality_budget,
        neutral_budget=args.neutral_budget,
        latents=args.latents,
        temperature=args.temperature,
        top_p=args.top_p,
    ).with_seed(args.seed or 0)


_SHOWN = 12


def _print(args: Namespace, document: Document) -> None:
    best = sorted(document["tried"], key=lambda row: (-row["n"], -row["value"]))[:_SHOWN]
    print(f"best of {len(document['tried'])} settings tried on development contents:")
    print_table(
        ["setting", *_GRADES, "value", "contents", "an answer"],
        [
            [
                row["says"],
                *(_rate(row[grade]) for grade in _GRADES),
                figure(row["value"], 3),
                str(row["n"]),
                _short(row["samples"][0]["answer"]) if row["samples"] else "",
            ]
            for row in best
        ],
        "setting,an answer",
    )
    some = next(iter(document["arms"].values()))
    print(f"on {some['n']} test contents:")
    print_table(
        ["arm", *_GRADES, "log p instructed", "an answer"],
        [
            [
                name,
                *(_interval(arm[grade]) for grade in _GRADES),
                figure(arm["instructed_log_prob"], 3),
                _short(arm["samples"][0]["answer"]) if arm["samples"] else "",
            ]
            for name, arm in document["arms"].items()
        ],
        "arm,an answer",
    )
    for name, damage in document["damage"].items():
        print(
            f"{name} on unrelated questions: {damage['delta_ce']:+.2f} nats a token, "
            f"{damage['right_to_wrong']} of {damage['right_before']} right answers lost"
        )
    _print_latents(document["latents"])
    over = document["over_budget"]
    # Settings are chosen before the test contents are seen, on which a plan may do worse.
    within = "its damage on development contents is within budget"
    print(within if not over else f"OVER BUDGET: {'; '.join(over)}")
    print(f"took {duration(document['seconds'])}")
    if args.out is not None:
        print(f"plan and find.json written to {args.out}")
        print_next("steer", "--plan", args.out, "--prompt", "TEXT")
        print_page(args.out / "find.html", show=args.open)


def _print_latents(latents: Document | None) -> None:
    if latents is None:
        return
    kept = latents["effect_kept"]
    share = "no effect to keep" if kept is None else f"{kept:.0%} of the directions' effect"
    print(f"{latents['latents']} latents of both phases keep {share}:")
    for layer in latents["layers"]:
        for phase in ("tail", "replies"):
            held = layer[phase]
            ids = ", ".join(map(str, held["latents"][:8]))
            more = "" if len(held["latents"]) <= 8 else ", ..."
            print(
                f"  layer {layer['layer']}, {phase}, {len(held['latents'])}: {ids}{more} "
                f"({held['squared_length_explained']:.2f} of the squared length)"
            )


def _rate(value: list[float] | None) -> str:
    return "-" if value is None else f"{value[0]:.2f}"


def _interval(value: list[float] | None) -> str:
    return "-" if value is None else f"{value[0]:.2f} [{value[1]:.2f}, {value[2]:.2f}]"


def _short(text: str, limit: int = 48) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
