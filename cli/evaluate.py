"""`saesteer evaluate`: a plan beside every control, with intervals, tests and damage."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UsageError
from saesteer.cli.flags import add_answering, add_common, add_model
from saesteer.cli.inputs import open_model, reserved, take_folder
from saesteer.cli.output import number as figure
from saesteer.cli.output import print_json, print_table, write_run
from saesteer.cli.parser import Repeated, VerbParser
from saesteer.cli.progress import Report, reporting
from saesteer.cli.values import count, counts, names

EXAMPLE = "saesteer evaluate --plan runs/sweep --n 40 -o runs/report"


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    what = parser.add_argument_group("what is evaluated")
    what.add_argument(
        "--plan",
        action=Repeated,
        metavar="DIR",
        help="a plan of rank or sweep; repeatable: each is evaluated for its own task",
    )
    what.add_argument(
        "--task",
        metavar="NAME/FILE",
        help="a built-in task, or a task.yaml (default: the task each plan was ranked for)",
    )
    add_model(what, "(default: the one the plan names)")
    what.add_argument(
        "--sae",
        metavar="DIR",
        help="where random latents are drawn from (default: the SAE the plan names)",
    )
    what.add_argument(
        "--ifeval",
        metavar="FILE",
        help="answer and grade these IFEval prompts too (the standard .jsonl; of rows that have "
        "prompt_without_instruction, each plan steers those whose one instruction its task is "
        "about) (default: none)",
    )
    what.add_argument(
        "--ifeval-only",
        type=names,
        metavar="ID,...",
        help="keep the IFEval rows all of whose instructions are among these; every plan then "
        "steers all of them (default: all)",
    )
    how = parser.add_argument_group("protocol")
    how.add_argument(
        "--controls",
        type=names,
        metavar="NAME,...",
        help="prompt, random, meandiff, logit-bias, or none (default: all of them)",
    )
    how.add_argument("--n", type=count, default=40, metavar="N", help="test contents (default: 40)")
    how.add_argument(
        "--split",
        choices=("train", "dev", "test"),
        default="test",
        metavar="NAME",
        help="train, dev or test (default: test, which nothing else has seen)",
    )
    how.add_argument(
        "--seeds",
        type=counts,
        metavar="N,...",
        help="answer every content once with each (default: --seed alone)",
    )
    how.add_argument(
        "--random-draws",
        type=count,
        default=2,
        metavar="N",
        help="arms of random latents (default: 2)",
    )
    add_answering(how)
    how.add_argument(
        "--max-new-tokens",
        type=count,
        metavar="N",
        help="longest answer to an IFEval prompt (default: 256); tasks have their own",
    )
    judge = parser.add_argument_group("a language model as judge (default: none, programs alone)")
    judge.add_argument(
        "--judge",
        metavar="URL",
        help="OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1; a key comes from "
        "SAESTEER_JUDGE_KEY (default: none)",
    )
    judge.add_argument("--judge-model", metavar="NAME", help="its model (needed with --judge)")
    add_common(
        parser,
        out="folder for report.json and report.html (default: print only)",
        force="replace an earlier report in --out",
    )


def run(args: Namespace) -> int:
    """Evaluate, print the rates, write the report."""
    _check_flags(args)
    with (
        reserved(args, plan=args.plan, task=args.task, sae=args.sae, ifeval=args.ifeval),
        reporting(args) as report,
    ):
        document = _evaluate(args, report)
        if args.out is not None:
            _write(take_folder(args), args, document)
    if args.json:
        print_json(document)
    else:
        _print(args, document)
    return 0


def _check_flags(args: Namespace) -> None:
    if not args.plan and args.ifeval is None:
        raise UsageError("nothing to evaluate: give --plan DIR, or --ifeval FILE")
    if (args.judge is None) != (args.judge_model is None):
        raise UsageError("--judge and --judge-model belong together: give both")
    if args.ifeval is None and args.ifeval_only is not None:
        raise UsageError("--ifeval-only needs --ifeval FILE")


def _evaluate(args: Namespace, report: Report) -> dict[str, Any]:
    from saesteer.checkpoints.sae_file import load_sae
    from saesteer.steering import load_plan
    from saesteer.steering.evaluation.arms import Decoding
    from saesteer.steering.evaluation.compare import CONTROLS, CompareConfig, compare
    from saesteer.steering.evaluation.judge import Judge
    from saesteer.steering.ifeval.benchmark import evaluate_ifeval, load_ifeval
    from saesteer.steering.reports.evaluation_report import report_document

    seed = args.seed or 0
    decoding = Decoding(
        temperature=args.temperature, top_p=args.top_p, seed=seed, batch_size=args.batch_size
    )
    config = CompareConfig(
        controls=CONTROLS if args.controls is None else _controls(args.controls),
        n=args.n,
        split=args.split,
        seeds=args.seeds or (seed,),
        random_draws=args.random_draws,
        decoding=decoding,
    )
    judge = None if args.judge is None else Judge(args.judge, args.judge_model)
    ifeval_rows = None if args.ifeval is None else load_ifeval(args.ifeval)
    plans = {str(path): load_plan(path) for path in args.plan or ()}
    groups = _by_task(args, plans)
    sae = None if args.sae is None else load_sae(args.sae)
    first = next(iter(plans.values()), None)
    lm = open_model(args, report, name=None if first is None else first.model.name)
    comparisons = []
    for task, members in groups:
        named = _arm_names(members)
        comparisons.append(compare(lm, task, named, config, sae=sae, judge=judge, progress=report))
    ifeval = None
    if ifeval_rows is not None:
        ifeval = evaluate_ifeval(
            lm,
            ifeval_rows,
            _arm_names(plans) if plans and args.ifeval_only else None,
            matched=() if args.ifeval_only else _matched(groups),
            only=args.ifeval_only or (),
            n=args.n,
            decoding=decoding,
            max_new_tokens=args.max_new_tokens or 256,
            progress=report,
        )
    beside = {
        one.task.name: _beside(list(m)) for one, (_, m) in zip(comparisons, groups, strict=True)
    }
    document = report_document(
        lm,
        comparisons,
        sweeps={name: found.get("sweep") for name, found in beside.items()},
        stability={name: found.get("stability") for name, found in beside.items()},
        shuffled={name: found.get("shuffled") for name, found in beside.items()},
        ifeval=ifeval,
        judge=args.judge_model,
    )
    for one in comparisons:
        for note in one.notes:
            report.warn(f"{one.task.name}: {note}")
        for name, damage in one.damage.items():
            if damage.leaves_norm_range and name in one.plans:
                report.warn(
                    f"{one.task.name}: the dose of {name} leaves the model's norm range "
                    f"({damage.norm_ratio:.2g} times the usual length)"
                )
    return document


def _controls(given: tuple[str, ...]) -> tuple[str, ...]:
    return () if given == ("none",) else given


def _matched(groups: list[tuple[Any, dict[str, Any]]]) -> list[tuple[Any, Any]]:
    """Each plan with its task, for IFEval. Raises UsageError where IFEval has no such task."""
    from saesteer.steering.ifeval.benchmark import INSTRUCTION_OF

    found = []
    for task, members in groups:
        if task.check_name not in INSTRUCTION_OF:
            raise UsageError(
                f"IFEval has no instruction like the task {task.name!r}: give --ifeval-only the "
                "ids of the rows to steer"
            )
        found += [(task, plan) for plan in members.values()]
    return found


def _by_task(args: Namespace, plans: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """Each task with the plans that are evaluated for it."""
    from saesteer.steering.tasks.task import builtin_tasks, load_task

    if not plans:
        return []
    if args.task is not None:
        return [(load_task(args.task), plans)]
    groups: dict[str, dict[str, Any]] = {}
    for path, plan in plans.items():
        if plan.task is None or plan.task.name not in builtin_tasks():
            what = "names no task" if plan.task is None else f"is for {plan.task.name!r}"
            raise UsageError(
                f"--plan {path} {what}, which is not built in: give --task NAME or FILE"
            )
        groups.setdefault(plan.task.name, {})[path] = plan
    return [(load_task(name), members) for name, members in groups.items()]


def _arm_names(plans: dict[str, Any]) -> dict[str, Any]:
    """`steered` for one plan; the folders' names for several, as far as those differ."""
    if len(plans) == 1:
        return {"steered": next(iter(plans.values()))}
    short = [Path(path).name for path in plans]
    labels = short if len(set(short)) == len(short) else list(plans)
    return dict(zip(labels, plans.values(), strict=True))


def _beside(paths: list[str]) -> dict[str, Any]:
    """What lies beside the first plan of a task: its sweep, and what its ranking says."""
    from saesteer.checkpoints.files import read_json

    given = Path(paths[0]).expanduser()
    folder = given if given.is_dir() else given.parent
    found: dict[str, Any] = {}
    if (folder / "sweep.json").is_file():
        found["sweep"] = read_json(folder / "sweep.json")
    if (folder / "ranking.json").is_file():
        ranking = read_json(folder / "ranking.json")
        for name in ("stability", "shuffled"):
            if isinstance(ranking.get(name), dict):
                found[name] = ranking[name]
    return found


def _write(folder: Path, args: Namespace, document: dict[str, Any]) -> None:
    from saesteer.checkpoints.files import plain, write_json, write_text
    from saesteer.steering.reports.evaluation_report import render_html

    write_json(folder / "report.json", document)
    write_text(folder / "report.html", render_html(plain(document)))
    write_run(folder, "evaluate", vars(args), model=document["model"])


def _print(args: Namespace, document: dict[str, Any]) -> None:
    for task in document["tasks"]:
        facts = task["task"]
        seeds = f", {len(task['seeds'])} seeds" if len(task["seeds"]) > 1 else ""
        sample = f"{task['n']} {task['split']} contents{seeds}"
        print(f"{facts['name']}: {facts['instruction']}  ({sample})")
        rows = []
        for arm in task["arms"]:
            damage = arm["damage"] or {}
            rows.append(
                [
                    arm["name"],
                    *(_rate(arm[key]) for key in ("loose", "strict", "degenerate")),
                    figure(arm["fluency"]["perplexity"], 3),
                    figure(damage.get("kl"), 3),
                    figure(damage.get("relative_dose"), 3),
                ]
            )
        print_table(
            ["arm", "loose", "strict", "degenerate", "perplexity", "KL", "||delta||/||h||"],
            rows,
            "arm",
            indent=2,
        )
        _print_tests(task["tests"], "p_holm", "p (Holm)")
        print()
    if document["ifeval"]:
        _print_ifeval(document["ifeval"])
    if args.out is not None:
        print(f"written to {args.out / 'report.json'} and {args.out / 'report.html'}")


def _print_ifeval(ifeval: dict[str, Any]) -> None:
    print(f"IFEval: {ifeval['prompts']} prompts")
    keys = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
    rows = [
        [name, *(_rate(arm["scores"][key]) for key in keys)] for name, arm in ifeval["arms"].items()
    ]
    print_table(["arm", *(key.replace("_", " ") for key in keys)], rows, "arm", indent=2)
    _print_tests(ifeval["tests"], "p", "p")
    for name, what in ifeval["stand_ins"].items():
        print(f"  {name}: judged with {what}")
    print()


def _print_tests(tests: list[dict[str, Any]], p: str, headed: str) -> None:
    """Paired differences with their intervals, and p-values under `headed`."""
    rows = [
        [
            f"{test['ours']} - {test['theirs']}",
            test["measure"],
            f"{test['difference']:+.2f} [{test['low']:+.2f}, {test['high']:+.2f}]",
            figure(test[p], 2),
        ]
        for test in tests
    ]
    if rows:
        headers = ["difference", "measure", "mean", headed]
        print_table(headers, rows, "difference,measure", indent=2)


def _rate(rate: dict[str, Any]) -> str:
    return f"{rate['value']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]"
