"""`saesteer sweep`: try doses, numbers of latents and scopes; success against damage."""

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from saesteer.checkpoints.errors import UsageError, none_of
from saesteer.cli.flags import add_answering, add_common, add_model
from saesteer.cli.inputs import open_model, reserved, take_folder
from saesteer.cli.output import Document, print_json, print_next, print_table, write_run
from saesteer.cli.output import number as figure
from saesteer.cli.parser import Repeated, VerbParser
from saesteer.cli.progress import Report, reporting
from saesteer.cli.values import budget, grid, rounds

if TYPE_CHECKING:
    from saesteer.sae.model.language_model import LanguageModel
    from saesteer.steering.doses.sweep import Sweep
    from saesteer.steering.plans.plan import Plan
    from saesteer.steering.tasks.task import Task

EXAMPLE = "saesteer sweep --plan runs/plan --grid k=1,3,5 --grid scale=1,1.5,2 -o runs/sweep"
NEEDED = "(--plan DIR | --sae DIR --task NAME)"

_AXES = ("k", "beta", "scale", "scope", "layer", "position", "read", "by")


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    what = parser.add_argument_group("what is swept over: --plan, or --sae to rank here")
    what.add_argument(
        "--plan",
        action=Repeated,
        metavar="DIR",
        help="folder of a plan that rank wrote; repeatable: several plans are compared",
    )
    what.add_argument(
        "--sae",
        action=Repeated,
        metavar="DIR",
        help="an SAE to rank with first; repeatable: one per layer, or {layer} in the name "
        "together with --grid layer=...",
    )
    what.add_argument(
        "--task",
        metavar="NAME/FILE",
        help="a built-in task, or a task.yaml (default: the task the plan was ranked for)",
    )
    add_model(what, "(default: the one the plan or the SAE names)")
    how = parser.add_argument_group("grid and race")
    how.add_argument(
        "--grid",
        action=Repeated,
        type=grid,
        metavar="AXIS=V,...",
        help="values to try of k (number of latents), beta, scale or scope, and with --sae of "
        "layer, position, read or by; a range is FROM:TO:STEP; repeatable (default: k=1,5,15, "
        "scale=0.5,1,1.5,2, scope=generation)",
    )
    how.add_argument(
        "--rounds",
        type=rounds,
        default=((12, 4), (40, 1)),
        metavar="N:KEEP,...",
        help="for each round: contents that every setting answers, and settings kept after it "
        "(default: 12:4,40:1)",
    )
    how.add_argument(
        "--budget",
        type=budget,
        metavar="KIND=X",
        help="largest damage on neutral questions, in nats per token: kl=0.5 or ce=0.5 (default: "
        "none)",
    )
    add_answering(how)
    add_common(
        parser,
        out="folder for the chosen plan, sweep.json and sweep.svg (default: print only)",
        force="replace an earlier sweep in --out",
    )


def run(args: Namespace) -> int:
    """Sweep, print the settings, write the chosen plan with the table and the picture."""
    axes = _axes(args)
    with (
        reserved(args, plan=args.plan, sae=args.sae, task=args.task),
        reporting(args) as report,
    ):
        from saesteer.steering import save_sweep, sweep_document
        from saesteer.steering.checks.words import keeping_thoughts

        with keeping_thoughts(not args.strip_thinking):
            found, lm = _sweep(args, axes, report)
        for warning in found.warnings:
            report.warn(warning)
        if args.out is None:
            document = sweep_document(lm, found)
        else:
            folder = take_folder(args)
            ranked = args.plan[0] if args.plan and len(args.plan) == 1 else None
            document = save_sweep(folder, lm, found, ranked=ranked)
            write_run(folder, "sweep", vars(args), model=document["model"])
    if args.json:
        print_json(document)
    else:
        _print(args, document)
    return 0


def _axes(args: Namespace) -> dict[str, tuple[Any, ...]]:
    """The grid's values by axis. Raises UsageError for an unknown axis or invalid values."""
    if bool(args.plan) == bool(args.sae):
        came = "both" if args.plan else "neither"
        raise UsageError(f"--plan DIR, or --sae DIR with --task: give one, got {came}")
    if args.sae and args.task is None:
        raise UsageError("--task is missing: --sae ranks for a task first")
    axes: dict[str, tuple[Any, ...]] = {}
    for name, values in args.grid or ():
        if name not in _AXES:
            raise none_of("the axis of --grid", _AXES, name)
        if name in ("layer", "position", "read", "by") and args.plan:
            raise UsageError(f"--grid {name} needs --sae: a plan is ranked already")
        axes[name] = _typed(name, values)
    if args.sae and ("layer" in axes) != all("{layer}" in name for name in args.sae):
        raise UsageError(
            "--grid layer=... and {layer} in the name of every --sae belong together: give both, "
            "such as --sae runs/sae/layer-{layer}_dsae-4096_k-32_seed-0"
        )
    return axes


def _typed(name: str, values: tuple[str, ...]) -> tuple[Any, ...]:
    if name in ("scope", "position", "read", "by"):
        return values
    kind = int if name in ("k", "layer") else float
    try:
        typed = tuple(kind(value) for value in values)
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise UsageError(f"--grid {name} must be {what}, got {','.join(values)}") from None
    if name == "k" and min(typed) < 1:
        raise UsageError(f"--grid k must be at least 1, got {min(typed)}")
    return typed


def _sweep(
    args: Namespace, axes: dict[str, tuple[Any, ...]], report: Report
) -> "tuple[Sweep, LanguageModel]":
    from saesteer.steering import Budget, Decoding, Grid, sweep
    from saesteer.steering.doses.sweep_files import rank_settings
    from saesteer.steering.hooking.scope import parse_scope

    for scope in axes.get("scope", ()):
        parse_scope(scope)
    rank_settings(
        axes.get("position", ()), axes.get("read", ()), axes.get("by", ()), args.seed or 0
    )
    decoding = Decoding(
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed or 0,
        batch_size=args.batch_size,
    )
    settings = Grid(
        **{name: axes[name] for name in ("k", "beta", "scale", "scope") if name in axes}
    )
    limit = None if args.budget is None else Budget(*args.budget)
    lm, task, plans = _plans(args, axes, max(settings.k), report)
    most = max(len(plan.latents) for plan in plans.values())
    if "k" in axes and max(axes["k"]) > most:
        report.warn(
            f"--grid k={max(axes['k'])} is more than the {most} latents there are: larger numbers "
            f"are left out, and {most} is tried where no other is given"
        )
    found = sweep(
        lm,
        task,
        # One plan competes with nobody and needs no name.
        next(iter(plans.values())) if len(plans) == 1 else plans,
        settings,
        rounds=args.rounds,
        budget=limit,
        decoding=decoding,
        progress=report,
    )
    return found, lm


def _plans(
    args: Namespace, axes: dict[str, tuple[Any, ...]], top: int, report: Report
) -> "tuple[LanguageModel, Task, dict[str, Plan]]":
    """The model, the task, and the plans that compete, by name."""
    from saesteer.checkpoints.sae_file import load_sae
    from saesteer.steering import load_task, ranked_plans
    from saesteer.steering.plans.names import by_folder, load_plans, task_of

    if args.plan:
        plans = load_plans(args.plan)
        first = next(iter(plans.values()))
        task = task_of(first, args.plan[0]) if args.task is None else load_task(args.task)
        return open_model(args, report, name=first.model.name), task, by_folder(plans)
    task = load_task(args.task)
    layers = axes.get("layer", ("",))
    names = [name.replace("{layer}", str(layer)) for name in args.sae for layer in layers]
    saes = [load_sae(name) for name in names]
    lm = open_model(args, report, name=saes[0].spec.model_name)
    plans = ranked_plans(
        lm,
        saes,
        task,
        position=axes.get("position", ()),
        read=axes.get("read", ()),
        by=axes.get("by", ()),
        top=top,
        seed=args.seed or 0,
        progress=report,
    )
    return lm, task, plans


def _rate(found: list[float] | None) -> str:
    return "–" if found is None else f"{found[0]:.2f}"


def _print(args: Namespace, document: Document) -> None:
    from saesteer.steering.grades.grade import GRADES

    chosen = document["chosen"]
    rows = []
    latest = [row for row in document["trials"] if row["latest"]]
    for row in sorted(latest, key=lambda row: (-row["n"], -row["success"]["value"])):
        damage = row["damage"]
        picked = row["n"] == chosen["n"] and all(
            row[key] == chosen[key] for key in ("plan", "layer", "k", "beta", "scale", "scope")
        )
        rows.append(
            [
                "*" if picked else "+" if row["on_front"] else "",
                *([row["plan"]] if row["plan"] else []),
                str(row["layer"]),
                str(row["k"]),
                figure(row["beta"]),
                figure(row["scale"]),
                row["scope"],
                figure(row["relative_dose"], 3),
                *(_rate(row[name]) for name in GRADES),
                f"{row['degenerate']['value']:.2f}",
                figure(damage["kl"], 3),
                figure(damage["delta_ce"], 3),
                str(row["n"]),
            ]
        )
    named = ["plan"] if chosen["plan"] else []
    print_table(
        [
            "",
            *named,
            "layer",
            "k",
            "beta",
            "scale",
            "scope",
            "||delta||/||h||",
            *GRADES,
            "degenerate",
            "KL",
            "dCE",
            "contents",
        ],
        rows,
        "plan,scope",
    )
    if document["skipped"]:
        kind = document["budget"]
        print(
            f"{len(document['skipped'])} settings over {kind['kind']}={kind['limit']:g} not tried"
        )
    print(
        f"unsteered {document['unsteered']['success']['value']:.2f}, prompted "
        f"{document['prompted']['success']['value']:.2f} ({chosen['success']['measure']}); "
        "* chosen, + on the front"
    )
    if args.out is not None:
        print(f"plan, sweep.json and sweep.svg written to {args.out}")
        print_next("evaluate", "--plan", args.out, "-o", "runs/report")
