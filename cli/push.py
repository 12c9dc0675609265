"""`saesteer push`: publish an SAE with a generated model card."""

from argparse import Namespace

from saesteer.cli.flags import add_common, need
from saesteer.cli.inputs import reserved, take_folder
from saesteer.cli.output import Document, print_json, write_run
from saesteer.cli.parser import VerbParser
from saesteer.cli.progress import reporting

EXAMPLE = "saesteer push --sae runs/sae --repo ./shared-saes"
NEEDED = "--sae DIR --repo REPO"


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    what = parser.add_argument_group("what is shared, and where")
    what.add_argument(
        "--sae", metavar="DIR", help="folder of an SAE, or of a run with several (needed)"
    )
    what.add_argument(
        "--repo",
        metavar="REPO",
        help="NAMESPACE/NAME on the Hub, or a folder such as ./shared (needed)",
    )
    what.add_argument(
        "--id",
        metavar="NAME",
        help="name of the SAE in the repository (default: its hook name; in a run of several SAEs, "
        "its folder)",
    )
    what.add_argument(
        "--metrics",
        metavar="DIR",
        help="folder that metrics -o wrote for this SAE, whose figures go into the card (default: "
        "none)",
    )
    what.add_argument(
        "--license",
        metavar="NAME",
        help="license of a new repository, for its card (default: none)",
    )
    what.add_argument("--private", action="store_true", help="make a new repository private")
    add_common(
        parser,
        out="folder for a run.json that records what was pushed (default: print only)",
        force="replace an SAE of that name in --repo; replace results in --out",
        seed_help=None,
        device_help=None,
        dtype_help=None,
        threads=False,
    )


def run(args: Namespace) -> int:
    """Push, and print how to load the SAE."""
    need(args, "--sae", "the folder of the SAE to share")
    need(args, "--repo", "NAMESPACE/NAME on the Hub, or a folder such as ./shared")
    with reserved(args, sae=args.sae, metrics=args.metrics), reporting(args) as report:
        from saesteer.checkpoints import push

        report.say(f"pushing {args.sae} to {args.repo}")
        pushed = push(
            args.sae,
            args.repo,
            sae_id=args.id,
            metrics=args.metrics,
            license_name=args.license,
            private=args.private,
            force=args.force,
        )
        if args.out is not None:
            write_run(take_folder(args), "push", vars(args), pushed=pushed)
    if args.json:
        print_json(pushed)
    else:
        _print_summary(pushed)
    return 0


def _print_summary(pushed: Document) -> None:
    at = f" at {pushed['revision']}" if pushed["revision"] else ""
    print(f"{pushed['repo']}{at} holds")
    for sae_id, sha256 in pushed["saes"].items():
        print(f"  {sae_id}  SHA-256 {sha256}")
    first = next(iter(pushed["saes"]))
    pin = f', revision="{pushed["revision"]}"' if pushed["revision"] else ""
    print(f'open with: checkpoints.from_pretrained("{pushed["repo"]}", "{first}"{pin})')
