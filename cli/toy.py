"""`saesteer toy`: models whose mechanism is known, to try the other verbs on."""

from argparse import Namespace

from saesteer.checkpoints.errors import UsageError
from saesteer.cli.flags import add_common, need
from saesteer.cli.inputs import reserved, take_folder
from saesteer.cli.output import print_json, print_next, write_run
from saesteer.cli.parser import VerbParser
from saesteer.cli.progress import reporting
from saesteer.cli.values import count

EXAMPLE = "saesteer toy hand-built -o runs/hand"
KINDS = ("hand-built",)


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    what = parser.add_argument_group("model")
    what.add_argument(
        "kind",
        nargs="?",
        metavar="KIND",
        help="hand-built: two blocks whose circuit is heads (0,0) and (1,1) by construction",
    )
    what.add_argument(
        "--scenes", type=count, default=200, metavar="N", help="pairs to write (default: 200)"
    )
    what.add_argument(
        "--redundant",
        action="store_true",
        help="with hand-built: a copy of head (1,1), so that one head at a time shows nothing",
    )
    add_common(
        parser,
        out="folder for model/, scenes.jsonl and groups.yaml (needed)",
        force="replace an earlier toy in --out",
        seed_help="seed of the scenes (default: 0)",
    )


def run(args: Namespace) -> int:
    """Write the model and its pairs."""
    if args.kind not in KINDS:
        came = "none" if args.kind is None else repr(args.kind)
        raise UsageError(f"toy takes one of {', '.join(KINDS)} as its first word, got {came}")
    need(args, "--out", "the folder to write the model to")
    with reserved(args), reporting(args):
        from saesteer.mechanisms import hand_built

        folder = take_folder(args)
        hand_built(folder, scenes=args.scenes, seed=args.seed or 0, redundant=args.redundant)
        write_run(folder, "toy", vars(args))
    if args.json:
        print_json({"kind": args.kind, "folder": str(folder), "pairs": args.scenes})
    else:
        print(f"written to {folder}: model/, scenes.jsonl, groups.yaml")
        print_next(
            "patch", "--model", folder / "model", "--pairs", folder / "scenes.jsonl",
            "--site", "z", "--at", "last,object",
        )  # fmt: skip
    return 0
