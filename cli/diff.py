"""`saesteer diff`: what fine-tuning changed in the weights, beside mere change."""

from argparse import Namespace

from saesteer.cli.flags import add_common, default, given, need
from saesteer.cli.inputs import exact_dtype, reserved
from saesteer.cli.output import number, print_json, print_table
from saesteer.cli.parser import VerbParser
from saesteer.cli.progress import reporting
from saesteer.cli.reading_files import keep_reading
from saesteer.cli.values import count, counts, names
from saesteer.mechanisms.reading_config import DiffConfig

EXAMPLE = "saesteer diff --base smollm2-135m-instruct --tuned tuned-model -o runs/diff"
NEEDED = "--base MODEL --tuned MODEL"


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    what = parser.add_argument_group("models")
    what.add_argument("--base", metavar="MODEL", help="the model before tuning (needed)")
    what.add_argument("--tuned", metavar="MODEL", help="the model after it (needed)")
    what.add_argument(
        "--what",
        type=names,
        metavar="NAME,...",
        help=f"heads: word pairs; concepts: what MLPs write {default(DiffConfig, 'what')}",
    )
    heads = parser.add_argument_group("heads")
    heads.add_argument(
        "--words", metavar="FILE", help="words, one a line (default: 1000 frequent English ones)"
    )
    heads.add_argument(
        "--verbs", metavar="FILE", help="instruction verbs, one a line (default: our list)"
    )
    heads.add_argument(
        "--most",
        type=count,
        metavar="N",
        help=f"words on each side of a dimension {default(DiffConfig, 'most')}",
    )
    heads.add_argument(
        "--related",
        metavar="HOW",
        help="which pairs count: embeddings, by the base's own input embeddings, or none, which is "
        f"all {default(DiffConfig, 'related')}",
    )
    heads.add_argument(
        "--distance",
        type=counts,
        metavar="N,...",
        help=f"tokens between query and key in rotary models {default(DiffConfig, 'distance')}",
    )
    concepts = parser.add_argument_group("concepts")
    concepts.add_argument(
        "--k", type=count, metavar="N", help=f"directions {default(DiffConfig, 'k')}"
    )
    concepts.add_argument(
        "--top",
        type=count,
        metavar="N",
        help=f"words at each end of a direction {default(DiffConfig, 'top')}",
    )
    add_common(
        parser,
        out="folder for report.json, report.html and run.json (default: print only)",
        force="replace earlier results in --out",
        seed_help="seed of noise and of permutations (default: 0)",
    )


def run(args: Namespace) -> int:
    """Compare, and print what changed."""
    need(args, "--base", "the model before tuning")
    need(args, "--tuned", "the model after it")
    config = DiffConfig(**given(args, DiffConfig))
    with (
        reserved(args, base=args.base, tuned=args.tuned, words=args.words, verbs=args.verbs),
        reporting(args) as report,
    ):
        from saesteer.mechanisms import diff
        from saesteer.mechanisms.readings.word_lists import INSTRUCTION_VERBS, read_words

        words = None if args.words is None else read_words(args.words)
        verbs = INSTRUCTION_VERBS if args.verbs is None else read_words(args.verbs)
        result = diff(
            args.base, args.tuned, config, words=words, verbs=verbs, device=args.device,
            dtype=exact_dtype(args), progress=report,
        )  # fmt: skip
        document = keep_reading(args, "diff", result)
    if args.json:
        print_json(document)
        return 0
    if document["heads"]:
        keys = ("verbs", "others", "p_adjusted")
        print_table(
            ["blocks", "verbs", "others", "p adjusted", "noise: verbs", "noise: others"],
            [
                [
                    f"{row['blocks'][0]}-{row['blocks'][1]}",
                    *(number(row["tuned"].get(key), 3) for key in keys),
                    *(number(row["noise"].get(key), 3) for key in keys[:2]),
                ]
                for row in document["heads"]
            ],
            left="blocks",
        )
    if document["concepts"]:
        print_table(
            ["block", "overlap", "noise", "largest angle"],
            [
                [str(row["layer"]), *(number(row[key], 4) for key in
                                      ("overlap", "noise", "largest_angle"))]
                for row in document["concepts"]
            ],
        )  # fmt: skip
    if args.out is not None:
        print(f"written to {args.out / 'report.html'}")
    return 0
