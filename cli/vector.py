"""`saesteer vector`: is an instruction carried by one state, and do two blocks add up?"""

from argparse import BooleanOptionalAction, Namespace
from pathlib import Path

from saesteer.cli.flags import add_common, add_model, default, given, need
from saesteer.cli.inputs import open_model, reserved, take_folder
from saesteer.cli.output import Document, number, print_json, print_next, print_table, write_run
from saesteer.cli.parser import VerbParser
from saesteer.cli.progress import reporting
from saesteer.cli.values import count, layers, numbers, one_layer
from saesteer.cli.values import number as a_number
from saesteer.mechanisms.reading_config import VectorConfig

EXAMPLE = (
    "saesteer vector --model smollm2-135m-instruct --pairs contrast:animals --layer 2 --sets 1 "
    "--n 4 -o runs/vectors"
)
_SHOWN = 12


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    data = parser.add_argument_group("pairs")
    add_model(data)
    data.add_argument(
        "--pairs",
        metavar="FILE",
        help="pairs as for patch, with the positions instruction and query: contrast:adjectives, "
        "contrast:animals, task:NAME with --against, or a .jsonl file (needed)",
    )
    data.add_argument(
        "--against", metavar="TASK", help="with task:NAME: another task on the same contents"
    )
    data.add_argument("--n", type=count, default=40, metavar="N", help="queries (default: 40)")
    data.add_argument(
        "--chat",
        action=BooleanOptionalAction,
        help="send texts through the chat template (default: off)",
    )
    grid = parser.add_argument_group("grid")
    grid.add_argument("--layer", type=layers, metavar="L,...", help="blocks (default: all)")
    grid.add_argument(
        "--at",
        metavar="NAME",
        help=f"where states are put: query-first, query-last or last {default(VectorConfig, 'at')}",
    )
    grid.add_argument(
        "--sets",
        type=count,
        metavar="N",
        help="1: single blocks, 2: pairs as well, 3: also triples of the best eight "
        f"{default(VectorConfig, 'sets')}",
    )
    grid.add_argument(
        "--iv-from",
        metavar="RUN",
        help="where the instruction is read: alone, or full, in the whole prompt "
        f"{default(VectorConfig, 'iv_from')}",
    )
    grid.add_argument(
        "--metric",
        metavar="NAME",
        help="logit-diff, logprob or logit (default: logit-diff where pairs have a wrong answer)",
    )
    grid.add_argument(
        "--best",
        type=count,
        metavar="N",
        help=f"pairs of blocks to test for superadditivity {default(VectorConfig, 'best')}",
    )
    grid.add_argument(
        "--doses",
        type=numbers,
        metavar="X,...",
        help=f"doses at which these are added instead {default(VectorConfig, 'doses')}",
    )
    grid.add_argument(
        "--budget",
        type=a_number,
        metavar="MINUTES",
        help="refuse a grid that would take longer, as predicted from its first batches "
        f"{default(VectorConfig, 'budget_minutes')}",
    )
    grid.add_argument(
        "--plan",
        type=one_layer,
        metavar="L",
        help="also write plan/, which adds the vector after block L when steering",
    )
    add_common(
        parser,
        out="folder for report.json, report.html, effects.safetensors and run.json (default: "
        "print only)",
        force="replace earlier results in --out",
        seed_help="seed of the pairs that are made, of halves and of controls (default: 0)",
        dtype_help="arithmetic of the language model: auto, float32, bfloat16 or float16 (default: "
        "auto, float32 here: differences of logits are small)",
    )


def run(args: Namespace) -> int:
    """Patch the vectors in, and print the best sets beside controls."""
    need(args, "--pairs", "pairs with an instruction and a query, such as contrast:animals")
    if args.plan is not None:
        need(args, "--out", "the folder to write plan/ to")
    config = VectorConfig(
        **given(args, VectorConfig, layers="layer", budget_minutes="budget")
    )  # fmt: skip
    with reserved(args, model=args.model, pairs=args.pairs), reporting(args) as report:
        from saesteer.mechanisms import instruction_vectors, load_pairs, save_reading
        from saesteer.steering.plans.plan_file import save_plan

        made = not Path(args.pairs).is_file()
        pairs = load_pairs(args.pairs, n=args.n, against=args.against, seed=config.seed)
        lm = open_model(args, report, dtype="float32" if args.dtype == "auto" else args.dtype)
        result = instruction_vectors(lm, pairs, config, drop=made, progress=report)
        plan = None if args.plan is None else result.plan(lm, args.plan)
        if args.out is None:
            document = result.document()
        else:
            folder = take_folder(args)
            document = save_reading(folder, result)
            if plan is not None:
                save_plan(plan, folder / "plan")
            write_run(folder, "vector", vars(args), model=document["model"])
    if args.json:
        print_json(document)
    else:
        _print(args, document)
    return 0


def _print(args: Namespace, document: Document) -> None:
    best = sorted(document["sets"], key=lambda row: -row["effect"])[:_SHOWN]
    controls = {
        name: {tuple(cell["layers"]): cell["effect"] for cell in cells}
        for name, cells in document["controls"].items()
    }
    rows = [
        [
            ", ".join(map(str, row["layers"])), number(row["effect"]),
            "-" if row["low"] is None else f"[{number(row['low'])}, {number(row['high'])}]",
            "-" if row["share"] is None else f"{row['share']:.2f}",
            *(number(own.get(tuple(row["layers"])), 2) for own in controls.values()),
        ]
        for row in best
    ]  # fmt: skip
    print_table(
        ["blocks", "effect", "95 % interval", "share", *controls], rows,
        left="blocks,95 % interval",
    )  # fmt: skip
    print(
        f"{document['metric']} {number(document['base'])} without the instruction, "
        f"{number(document['full'])} with it; {document['n_queries']} queries"
    )
    tests = document["superadditivity"]
    if tests:
        passed = sum(row["p_adjusted"] < 0.05 and row["interaction"] > 0 for row in tests)
        print(
            f"{passed} of {len(tests)} pairs of blocks do more together than alone (sign test on "
            "the half of the queries that did not choose them, Holm)"
        )
    if args.out is not None:
        print(f"written to {args.out / 'report.html'}")
        if args.plan is not None:
            print_next("steer", "--plan", args.out / "plan", "-p", "...")
