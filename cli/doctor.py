"""`saesteer doctor`: check that hooks work on a model, and predict what a job costs."""

from argparse import Namespace
from pathlib import Path

from saesteer.checkpoints.errors import UsageError
from saesteer.cli.flags import SITE_HELP, add_common, add_model
from saesteer.cli.inputs import open_model, open_sae, reserved, take_folder
from saesteer.cli.output import (
    Document,
    Failed,
    amount,
    duration,
    paint,
    print_json,
    size,
    write_run,
)
from saesteer.cli.parser import VerbParser
from saesteer.cli.progress import reporting
from saesteer.cli.values import count, one_layer
from saesteer.sae.config import HarvestConfig, TextConfig

EXAMPLE = "saesteer doctor --model smollm2-135m-instruct --layer 20 --tokens 1000000"


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    what = parser.add_argument_group("what is examined")
    add_model(what)
    what.add_argument(
        "--layer",
        type=one_layer,
        metavar="L",
        help="block to examine (default: the SAE's own, or the middle)",
    )
    what.add_argument(
        "--site", metavar="SITE", help=f"{SITE_HELP} (default: the SAE's own, or resid_post)"
    )
    what.add_argument("--sae", metavar="DIR", help="an SAE to try on this model (default: none)")
    job = parser.add_argument_group("the job whose cost is predicted")
    job.add_argument(
        "--tokens",
        type=count,
        default=200_000,
        metavar="N",
        help="activations to harvest (default: 200000)",
    )
    job.add_argument(
        "--context", type=count, default=256, metavar="N", help="tokens per sequence (default: 256)"
    )
    job.add_argument(
        "--batch-size",
        type=count,
        default=16,
        metavar="N",
        help="sequences per forward pass of the language model (default: 16)",
    )
    add_common(
        parser,
        out="folder for doctor.json (default: print only)",
        force="accept an SAE that was trained on other weights; replace results in --out",
        seed_help=None,
    )


def run(args: Namespace) -> int:
    """Run the checks, print the results, and fail when a check fails."""
    if args.batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {args.batch_size}")
    # Refuses numbers out of range, before the model is loaded.
    HarvestConfig(
        layers=(0,),
        tokens=args.tokens,
        text=TextConfig(context=args.context, batch_size=args.batch_size),
    )
    with reserved(args, model=args.model, sae=args.sae), reporting(args) as report:
        from saesteer.sae import doctor
        from saesteer.sae.model.hooks import check_site

        check_site(args.site)
        sae = None if args.sae is None else open_sae(args, report)
        lm = open_model(args, report, name=None if sae is None else sae.spec.model_name)
        found = doctor(
            lm,
            layer=args.layer,
            site=args.site,
            sae=None if sae is None else sae.to(lm.device),
            tokens=args.tokens,
            context=args.context,
            batch_size=args.batch_size,
            force=args.force,
            progress=report,
        )
        if args.out is not None:
            _write(take_folder(args), args, found)
    if args.json:
        print_json(found)
    else:
        _print_findings(found, args.out)
    failed = [check for check in found["checks"] if not check["ok"]]
    if failed:
        first = f"{failed[0]['name']}: {failed[0]['detail']}"
        raise Failed(f"{len(failed)} of {len(found['checks'])} checks failed, first: {first}")
    return 0


def _write(folder: Path, args: Namespace, found: Document) -> None:
    from saesteer.checkpoints.files import write_json

    write_json(folder / "doctor.json", found)
    write_run(folder, "doctor", vars(args), model=found["model"])


def _print_findings(found: Document, out: Path | None) -> None:
    model = found["model"]
    print(f"{model['name']}: layer {found['layer']}, {found['site']} ({found['module']})")
    for check in found["checks"]:
        mark = paint("ok  ", "green") if check["ok"] else paint("FAIL", "red")
        print(f"  {mark} {check['name']}: {check['detail']}")
    print(f"for {amount(found['predictions']['tokens'])} tokens")
    for name, value in found["predictions"].items():
        if name != "tokens":
            print(f"  {name.replace('_', ' ')}: {_measured(name, value)}")
    if out is not None:
        print(f"written to {out / 'doctor.json'}")


def _measured(name: str, value: object) -> str:
    """A prediction in the unit that its name ends with."""
    if not isinstance(value, int | float):
        return str(value)
    if name.endswith("bytes"):
        return size(value)
    if name.endswith("per_second"):
        return amount(value)
    return duration(value) if name.endswith("seconds") else amount(value)
