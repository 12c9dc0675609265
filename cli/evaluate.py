"""`saesteer evaluate`: compare a plan with every control: intervals, tests and damage."""

from argparse import Namespace
from typing import TYPE_CHECKING

from saesteer.checkpoints.errors import UsageError
from saesteer.cli.flags import (
    add_answering,
    add_common,
    add_dictionaries,
    add_latent_pages,
    add_model,
    add_open,
    check_open,
)
from saesteer.cli.inputs import check_latent_pages, open_model, reserved, take_folder
from saesteer.cli.output import (
    Document,
    command_line,
    print_json,
    print_page,
    print_table,
    with_flags,
    write_run,
)
from saesteer.cli.output import number as figure
from saesteer.cli.parser import Repeated, VerbParser
from saesteer.cli.progress import Report, reporting
from saesteer.cli.values import count, counts, names

if TYPE_CHECKING:
    from saesteer.steering.reports.plan_evaluation import Evaluation

EXAMPLE = "saesteer evaluate --plan runs/sweep --n 40 -o runs/report"
NEEDED = "--plan DIR"


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    what = parser.add_argument_group("what is evaluated")
    what.add_argument(
        "--plan",
        action=Repeated,
        metavar="DIR",
        help="folder of a plan that rank or sweep wrote; repeatable: each is evaluated for its own "
        "task",
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
        help="also answer and grade these IFEval prompts (the standard .jsonl). A plan steers the "
        "rows that have prompt_without_instruction and whose only instruction is that of its task "
        "(default: none)",
    )
    what.add_argument(
        "--ifeval-only",
        type=names,
        metavar="ID,...",
        help="keep only IFEval rows all of whose instructions are listed here; every plan then "
        "steers all of them (default: all)",
    )
    add_dictionaries(what)
    how = parser.add_argument_group("protocol")
    how.add_argument(
        "--controls",
        type=names,
        metavar="NAME,...",
        help="what to compare with: prompt, random, meandiff, logit-bias, or none (default: all of "
        "them)",
    )
    how.add_argument(
        "--n", type=count, default=40, metavar="N", help="contents to answer (default: 40)"
    )
    how.add_argument(
        "--split",
        choices=("train", "dev", "test"),
        default="test",
        metavar="NAME",
        help="contents to use: train, dev or test (default: test, which no other verb uses)",
    )
    how.add_argument(
        "--seeds",
        type=counts,
        metavar="N,...",
        help="answer every content once with each seed (default: only --seed)",
    )
    how.add_argument(
        "--random-draws",
        type=count,
        default=2,
        metavar="N",
        help="number of controls with random latents (default: 2)",
    )
    add_answering(how)
    add_open(how)
    how.add_argument(
        "--max-new-tokens",
        type=count,
        metavar="N",
        help="longest answer to an IFEval prompt (default: 256); a task sets its own limit",
    )
    judge = parser.add_argument_group("a language model as judge (default: none, programs grade)")
    judge.add_argument(
        "--judge",
        metavar="URL",
        help="OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1; its key is taken from "
        "the environment variable SAESTEER_JUDGE_KEY (default: none)",
    )
    judge.add_argument(
        "--judge-model",
        metavar="NAME",
        help="name of the model at that endpoint (needed with --judge)",
    )
    add_latent_pages(how)
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
        from saesteer.steering.checks.words import keeping_thoughts

        with keeping_thoughts(not args.strip_thinking):
            found = _evaluate(args, report)
        document = found.document
        for warning in found.warnings:
            report.warn(warning)
        if args.out is not None:
            folder = take_folder(args)
            document["made"]["command"] = command_line()
            found.save(folder, args.latent_pages or ())
            write_run(folder, "evaluate", vars(args), model=document["model"])
    if args.json:
        print_json(document)
    else:
        _print(args, document)
    return 0


def _check_flags(args: Namespace) -> None:
    check_latent_pages(args)
    if not args.plan and args.ifeval is None:
        raise UsageError("nothing to evaluate: give --plan DIR, or --ifeval FILE")
    if (args.judge is None) != (args.judge_model is None):
        raise UsageError("--judge and --judge-model belong together: give both")
    check_open(args)
    if args.ifeval is None and args.ifeval_only is not None:
        raise UsageError("--ifeval-only needs --ifeval FILE")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")


def _evaluate(args: Namespace, report: Report) -> "Evaluation":
    from saesteer.checkpoints.sae_file import load_sae
    from saesteer.steering import Decoding, Judge, evaluate_plans, load_ifeval, plans_by_task
    from saesteer.steering.evaluation.compare import CONTROLS, CompareConfig
    from saesteer.steering.reports.plan_evaluation import check_ifeval

    seed = args.seed or 0
    controls = CONTROLS if args.controls is None else args.controls
    config = CompareConfig(
        controls=() if controls == ("none",) else controls,
        n=args.n,
        split=args.split,
        seeds=args.seeds or (seed,),
        random_draws=args.random_draws,
        dictionaries=args.dictionaries,
        decoding=Decoding(
            temperature=args.temperature, top_p=args.top_p, seed=seed, batch_size=args.batch_size
        ),
    )
    judge = None if args.judge is None else Judge(args.judge, args.judge_model)
    rows = None if args.ifeval is None else load_ifeval(args.ifeval)
    groups = plans_by_task(args.plan or (), args.task)
    if rows is not None:
        check_ifeval(groups, rows, args.ifeval_only or ())
    sae = None if args.sae is None else load_sae(args.sae)
    plans = [plan for group in groups for plan in group.plans.values()]
    lm = open_model(args, report, name=plans[0].model.name if plans else None)
    return evaluate_plans(
        lm,
        groups,
        config,
        sae=sae,
        judge=judge,
        ifeval=rows,
        only=args.ifeval_only or (),
        max_new_tokens=args.max_new_tokens or 256,
        progress=report,
    )


def _print(args: Namespace, document: Document) -> None:
    from saesteer.steering.grades.grade import GRADES
    from saesteer.steering.reports.evaluation_report import grade_text

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
                    *(grade_text(arm[name]) for name in GRADES),
                    figure(arm["fluency"]["perplexity"], 3),
                    figure(damage.get("kl"), 3),
                    figure(damage.get("relative_dose"), 3),
                ]
            )
        print_table(
            ["arm", *GRADES, "perplexity", "KL", "||delta||/||h||"],
            rows,
            "arm",
            indent=2,
        )
        for name, why in task["grades"]["not_graded"].items():
            print(f"  {name}: {with_flags(why)}")
        _print_tests(task["tests"], "p_holm", "p (Holm)")
        print()
    if document["ifeval"]:
        _print_ifeval(document["ifeval"])
    if args.out is not None:
        print(f"written to {args.out / 'report.json'}")
        print_page(args.out / "report.html", show=args.open)


def _print_ifeval(ifeval: Document) -> None:
    from saesteer.steering.evaluation.intervals import rate_text

    print(f"IFEval: {ifeval['prompts']} prompts")
    keys = ("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose")
    rows = [
        [name, *(rate_text(arm["scores"][key]) for key in keys)]
        for name, arm in ifeval["arms"].items()
    ]
    print_table(["arm", *(key.replace("_", " ") for key in keys)], rows, "arm", indent=2)
    _print_tests(ifeval["tests"], "p", "p")
    for name, what in ifeval["stand_ins"].items():
        print(f"  {name}: judged with {what}")
    print()


def _print_tests(tests: list[Document], p: str, headed: str) -> None:
    """Print paired differences with their intervals, and p-values under the header `headed`."""
    from saesteer.steering.evaluation.intervals import difference_text

    rows = [
        [
            f"{test['ours']} - {test['theirs']}",
            test["measure"],
            difference_text(test),
            figure(test[p], 2),
        ]
        for test in tests
    ]
    if rows:
        headers = ["difference", "measure", "mean", headed]
        print_table(headers, rows, "difference,measure", indent=2)
