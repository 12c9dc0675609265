"""`saesteer toy`: models whose mechanism is known, to try the other verbs on."""

from argparse import Namespace

from saesteer.checkpoints.errors import UsageError
from saesteer.cli.flags import add_common, default, given, need
from saesteer.cli.inputs import reserved, take_folder
from saesteer.cli.output import print_json, print_next, write_run
from saesteer.cli.parser import VerbParser
from saesteer.cli.progress import reporting
from saesteer.cli.values import count
from saesteer.mechanisms.config import ToyConfig
from saesteer.mechanisms.reading_config import SymbolsConfig

EXAMPLE = "saesteer toy hand-built -o runs/hand"
NEEDED = "KIND -o DIR"
KINDS = ("hand-built", "boxes", "instructions")


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    what = parser.add_argument_group("model")
    what.add_argument(
        "kind",
        nargs="?",
        metavar="KIND",
        help="hand-built: two blocks whose circuit is heads (0,0) and (1,1) by construction; "
        "boxes: a base and a tuned model, trained here in minutes; instructions: a model that "
        "learns tasks from patterns of symbols, with checkpoints and states for probe (needed)",
    )
    what.add_argument(
        "--scenes", type=count, default=200, metavar="N",
        help="pairs to write; with instructions, prompts of each kind (default: 200)",
    )  # fmt: skip
    what.add_argument(
        "--steps", type=count, metavar="N",
        help=f"steps of the base model of boxes {default(ToyConfig, 'steps')}, or of instructions "
        f"{default(SymbolsConfig, 'steps')}",
    )  # fmt: skip
    what.add_argument(
        "--tuning-steps", type=count, metavar="N",
        help=f"with boxes: steps of the tuned model {default(ToyConfig, 'tuning_steps')}",
    )  # fmt: skip
    what.add_argument(
        "--every", type=count, metavar="N",
        help=f"with instructions: steps between checkpoints {default(SymbolsConfig, 'every')}",
    )  # fmt: skip
    what.add_argument(
        "--loss", metavar="WHAT",
        help="with instructions: train on the output, or on all tokens "
        f"{default(SymbolsConfig, 'loss')}",
    )  # fmt: skip
    what.add_argument(
        "--redundant",
        action="store_true",
        help="with hand-built: a copy of head (1,1), so that one head at a time shows nothing",
    )
    what.add_argument(
        "--decoy",
        action="store_true",
        help="with hand-built: a head (0,1) that copies what (0,0) does to where nothing reads it",
    )
    add_common(
        parser,
        out="folder for model/, scenes.jsonl and groups.yaml (needed)",
        force="replace an earlier toy in --out",
        seed_help="seed of the scenes (default: 0)",
        device_help=None,
        dtype_help=None,
    )


def run(args: Namespace) -> int:
    """Write the model and its pairs."""
    if args.kind not in KINDS:
        came = "none" if args.kind is None else repr(args.kind)
        raise UsageError(f"KIND must be one of {', '.join(KINDS)}, got {came}")
    need(args, "--out", "the folder to write the model to")
    with reserved(args), reporting(args) as report:
        from saesteer.mechanisms import hand_built, train_boxes, train_instructions

        seed = args.seed or 0
        document = {"kind": args.kind, "folder": str(args.out), "pairs": args.scenes}
        if args.kind == "boxes":
            config = ToyConfig(seed=seed, **given(args, ToyConfig, seed="_"))
            folder = take_folder(args)
            document |= train_boxes(folder, config, scenes=args.scenes, progress=report)
        elif args.kind == "instructions":
            symbols = SymbolsConfig(seed=seed, **given(args, SymbolsConfig, seed="_"))
            folder = take_folder(args)
            document |= train_instructions(folder, symbols, states=args.scenes, progress=report)
        else:
            folder = take_folder(args)
            hand_built(folder, scenes=args.scenes, seed=seed, redundant=args.redundant,
                       decoy=args.decoy)  # fmt: skip
        write_run(folder, "toy", vars(args))
    if args.json:
        print_json(document)
        return 0
    if args.kind == "instructions":
        step, by_split = list(document["accuracy"].items())[-1]
        told = ", ".join(f"{split} {share:.2f}" for split, share in by_split.items())
        print(f"step {step}: accuracy {told}")
        print(f"written to {folder}")
        print_next("probe", "--models", folder / "steps", "--cluster")
        return 0
    model = folder / ("base" if args.kind == "boxes" else "model")
    words = ["circuit", "--model", model, "--pairs", folder / "scenes.jsonl", "--groups",
             folder / "groups.yaml"]  # fmt: skip
    if args.kind == "boxes":
        for name, by_boxes in document["accuracy"].items():
            told = ", ".join(f"{share:.2f} at {boxes}" for boxes, share in by_boxes.items())
            print(f"{name}: accuracy {told} boxes")
        words += ["--cross", folder / "tuned"]
    print(f"written to {folder}")
    print_next(*words)
    return 0
