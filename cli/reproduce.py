"""`saesteer reproduce`: repeat a recorded training or harvest and compare the results."""

from argparse import Namespace

from saesteer.checkpoints.errors import UsageError
from saesteer.cli.flags import add_common
from saesteer.cli.inputs import reserved
from saesteer.cli.output import Document, Failed, amount, number, paint, print_json
from saesteer.cli.parser import VerbParser
from saesteer.cli.progress import reporting
from saesteer.cli.values import folders

EXAMPLE = "saesteer reproduce runs/sae"
NEEDED = "RUN"

_LONGEST = 60


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    what = parser.add_argument_group("what is repeated")
    what.add_argument(
        "run",
        nargs="?",
        metavar="RUN",
        help="folder of a finished train run, of one SAE of it, or of a finished harvest (needed)",
    )
    what.add_argument(
        "--model", metavar="NAME", help="where the run's model is now (default: where it was)"
    )
    what.add_argument(
        "--activations",
        type=folders,
        metavar="DIR,...",
        help="where the run's shards are now (default: where they were)",
    )
    what.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python files that come with the model (default: none is ever run)",
    )
    add_common(
        parser,
        out="folder that keeps the repetition (default: a temporary one)",
        force="replace an earlier run in --out",
        # Refused when given: those of the record are used.
        seed_help=None,
        device_help=None,
        dtype_help=None,
        threads=False,  # sums depend on it: the recorded number is used
    )


def run(args: Namespace) -> int:
    """Repeat the run, print the comparison, and fail when anything differs."""
    if args.run is None:
        raise UsageError("RUN is missing: the folder of a finished run, such as runs/sae")
    if args.device != "auto" or args.dtype != "auto" or args.seed is not None:
        flag = next(
            name
            for name, usual in (("device", "auto"), ("dtype", "auto"), ("seed", None))
            if getattr(args, name) != usual
        )
        raise UsageError(f"--{flag} is part of the record: reproduce repeats what was recorded")
    inputs = {"run": args.run, "activations": args.activations}
    with reserved(args, locked=False, **inputs), reporting(args) as report:
        from saesteer.sae import reproduce

        found = reproduce(
            args.run,
            args.out,
            model=args.model,
            activations=args.activations,
            force=args.force,
            trust_remote_code=args.trust_remote_code,
            progress=report,
        )
    if args.json:
        print_json(found)
    else:
        _print_findings(found)
    if not found["equal"]:
        raise Failed(f"the repetition of {args.run} differs: {_first(found)}")
    return 0


def _print_findings(found: Document) -> None:
    for shards in [found["shards"]] if "shards" in found else []:
        equal = shards["equal"]
        print(f"{paint('equal ', 'green') if equal else paint('DIFFER', 'red')} {found['run']}")
        then, now = shards["tokens"]
        print(f"  {amount(then)} tokens then, {amount(now)} now")
        if equal and not shards["shards_equal"]:
            print("  every row is equal; the shards are cut at other places, as a stop leaves them")
        if shards["first_differing_row"] is not None:
            print(
                f"  rows differ from {shards['first_differing_row']} on, at most by "
                f"{number(shards['max_abs_difference'])}"
            )
    for sae in found.get("saes", ()):
        equal = sae["weights_equal"] and sae["metrics_equal"]
        print(f"{paint('equal ', 'green') if equal else paint('DIFFER', 'red')} {sae['folder']}")
        if equal:
            continue
        for name, largest in sae["max_abs_difference"].items():
            print(f"  {name}: largest difference {number(largest)}")
        for name, (then, now) in sae["final"].items():
            if then != now:
                print(f"  final {name}: {number(then)} then, {number(now)} now")
        if sae["first_differing_step"] is not None:
            print(f"  the logs differ from step {sae['first_differing_step']} on")
    for difference in found["differences"]:
        then, now = (_short(difference[key]) for key in ("then", "now"))
        print(f"  {difference['what']}: {then} then, {now} now")
    if not found["differences"]:
        print("  the same inputs, versions and machine")


def _first(found: Document) -> str:
    if found["differences"]:
        return f"so do its inputs or environment, first {found['differences'][0]['what']}"
    return "inputs, versions and machine are the same, so something in it is not deterministic"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
