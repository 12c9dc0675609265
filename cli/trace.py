"""`saesteer trace`: by which tokens, heads and routes an answer's logit came about."""

from argparse import BooleanOptionalAction, Namespace
from pathlib import Path

from saesteer.checkpoints.errors import UsageError
from saesteer.cli.flags import add_common, add_model, default, given
from saesteer.cli.inputs import exact_dtype, open_model, reserved
from saesteer.cli.output import Document, number, print_json, print_table
from saesteer.cli.parser import VerbParser
from saesteer.cli.progress import reporting
from saesteer.cli.reading_files import keep_reading
from saesteer.cli.values import count
from saesteer.cli.values import number as a_number
from saesteer.mechanisms.reading_config import TraceConfig

EXAMPLE = (
    'saesteer trace --model runs/hand/model -p "boxes F apple , G pear . F" --answer " apple" '
    "-o runs/trace"
)
NEEDED = "(-p TEXT | --pairs FILE)"
_SHOWN = 15


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    data = parser.add_argument_group("what is traced")
    add_model(data)
    data.add_argument("-p", "--prompt", metavar="TEXT", help="one prompt (this or --pairs)")
    data.add_argument(
        "--answer", metavar="TEXT", help="what follows it (default: the model's own next token)"
    )
    data.add_argument(
        "--wrong",
        metavar="TEXT",
        help="an answer whose logit is subtracted (default: the mean of the vocabulary)",
    )
    data.add_argument(
        "--pairs",
        metavar="FILE",
        help="pairs as for patch: compare the heads of two tasks on the same queries",
    )
    data.add_argument(
        "--at",
        metavar="NAME",
        default="instruction",
        help="with --pairs: the position whose tokens are followed (default: instruction)",
    )
    data.add_argument(
        "--n", type=count, default=40, metavar="N", help="with --pairs: how many (default: 40)"
    )
    data.add_argument(
        "--chat",
        action=BooleanOptionalAction,
        help="send texts through the chat template (default: off)",
    )
    routes = parser.add_argument_group("routes")
    routes.add_argument(
        "--beam",
        type=count,
        metavar="N",
        help=f"routes followed on in each block {default(TraceConfig, 'beam')}",
    )
    routes.add_argument(
        "--tau",
        type=a_number,
        metavar="SHARE",
        help="drop routes below this share of the logit " + default(TraceConfig, "tau"),
    )
    add_common(
        parser,
        out="folder for report.json, report.html and run.json (default: print only)",
        force="replace earlier results in --out",
        seed_help="seed of the pairs that are made and of resampling (default: 0)",
        dtype_help="arithmetic of the language model: auto, float32, bfloat16 or float16 (default: "
        "auto, float32 here: an account adds up many small terms)",
    )


def run(args: Namespace) -> int:
    """Trace, and print the largest routes or heads."""
    if (args.prompt is None) == (args.pairs is None):
        raise UsageError("give either --prompt TEXT or --pairs FILE")
    config = TraceConfig(**given(args, TraceConfig))
    with reserved(args, model=args.model, pairs=args.pairs), reporting(args) as report:
        from saesteer.mechanisms import compare_traces, load_pairs, trace

        pairs = args.pairs and load_pairs(args.pairs, n=args.n, seed=config.seed)
        lm = open_model(args, report, dtype=exact_dtype(args))
        result = (
            trace(lm, args.prompt, args.answer, config, wrong=args.wrong, progress=report)
            if pairs is None
            else compare_traces(lm, pairs, config, at=args.at, progress=report,
                                drop=not Path(args.pairs).is_file())
        )  # fmt: skip
        document = keep_reading(args, "trace", result, "model")
    if args.json:
        print_json(document)
        return 0
    if pairs is None:
        _print_trace(document)
    else:
        _print_comparison(document)
    print(document["caution"])
    if args.out is not None:
        print(f"written to {args.out / 'report.html'}")
    return 0


def _print_trace(document: Document) -> None:
    rows = [[one["route"], number(one["mass"])] for one in document["routes"][:_SHOWN]]
    print_table(["route", "mass"], rows, left="route")
    print(
        f"logit {document['logit']:+.4f} = tokens {sum(document['token_mass']):+.4f} + biases "
        f"{document['biases']:+.4f} + rounding {document['gap']:+.1e}; {len(document['routes'])} "
        f"routes explain {document['explained']:.2f}"
    )


def _print_comparison(document: Document) -> None:
    best = sorted(document["heads"], key=lambda row: -abs(row["difference"]))[:_SHOWN]
    print_table(
        ["head", "clean", "corrupt", "difference", "p adjusted"],
        [
            [
                f"{row['layer']}.{row['head']}", number(row["clean"]), number(row["corrupt"]),
                number(row["difference"]), number(row["p_adjusted"], 2),
            ]
            for row in best
        ],
        left="head",
    )  # fmt: skip
    print(
        f"mass read at {document['at']}, of {number(document['clean_logit'])} in clean and "
        f"{number(document['corrupt_logit'])} in corrupt prompts; {document['n_pairs']} pairs"
    )
