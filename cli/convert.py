"""`saesteer convert`: an SAE or a plan in another format, with a report of what differs."""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from saesteer.checkpoints.errors import UsageError
from saesteer.cli.flags import add_common, need
from saesteer.cli.inputs import reserved, take_folder
from saesteer.cli.output import Document, number, print_json, print_table, write_run
from saesteer.cli.parser import VerbParser
from saesteer.cli.progress import Report, reporting
from saesteer.cli.values import one_layer

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLE = "saesteer convert --from runs/sae --to runs/sparsify --format sparsify"
NEEDED = "--from SOURCE"

_SAE_FORMATS = ("saelens", "sparsify", "dictionary_learning", "saesteer")
_PLAN_FORMATS = ("gguf", "steering-vectors", "lm-eval", "lm-eval-csv", "plan")

_FIGURES = {
    "latents_max": "largest |difference| of a latent",
    "latents_mean": "mean |difference| of a latent",
    "latents_relative": "largest, over the row's largest pre-activation",
    "flips": "latents active in one of the two alone",
    "reconstruction_max": "largest |difference| of the reconstruction",
    "reconstruction_mean": "mean |difference| of the reconstruction",
    "reconstruction_relative": "largest, over the row's largest value",
    "l0_before": "active latents per row before",
    "l0_after": "active latents per row after",
}


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    what = parser.add_argument_group("what is converted")
    what.add_argument(
        "--from",
        metavar="PATH",
        help="an SAE (folder or file of any supported format, RELEASE:ID of sae_lens), a plan, or "
        "a file of vectors (needed)",
    )
    what.add_argument(
        "--format",
        metavar="NAME",
        choices=(*_SAE_FORMATS, *_PLAN_FORMATS),
        help=f"format to write. SAEs: {', '.join(_SAE_FORMATS)} (default: saelens); plans: "
        f"{', '.join(_PLAN_FORMATS[:-1])} (default: gguf); vectors: plan",
    )
    sae = parser.add_argument_group("SAEs")
    sae.add_argument(
        "--canonical",
        action="store_true",
        help="rescale to decoder rows of length 1 and fold away the input bias, so that doses can "
        "be compared between SAEs",
    )
    sae.add_argument(
        "--jumprelu",
        action="store_true",
        help="write a gated or ReLU SAE as the jumprelu that computes exactly the same",
    )
    sae.add_argument(
        "--activations",
        metavar="DIR",
        help="compare the two also on activations that harvest stored",
    )
    sae.add_argument(
        "--layer",
        type=one_layer,
        metavar="L",
        help="layer of --activations to use (default: the SAE's own)",
    )
    plan = parser.add_argument_group("plans")
    plan.add_argument(
        "--as-scope",
        metavar="SCOPE",
        choices=("all",),
        help="`all`: let a plan with a narrower scope be exported to a tool that steers every "
        "position (default: refuse it)",
    )
    plan.add_argument(
        "--hookpoint",
        metavar="MODULE",
        help="module path of the block for lm-eval (default: layers.L, as in Llama)",
    )
    plan.add_argument(
        "--model",
        metavar="NAME",
        help="the model that imported vectors are for (needed with --format plan)",
    )
    plan.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python files that come with the model (default: none is ever run)",
    )
    add_common(
        parser,
        out="folder to write to; --to is the same (default: report only)",
        force="replace what is in --out",
        dtype_help="dtype of the weights written: float32, bfloat16, float16 or float64 "
        "(default: auto, the source's)",
    )


def run(args: Namespace) -> int:
    """Convert, and print the report."""
    need(args, "--from", "an SAE folder or file, RELEASE:ID, a plan, or vectors")
    source: str = getattr(args, "from")
    kind = args.format or ("gguf" if _is_plan(source) else "saelens")
    if _is_plan(source) and kind not in _PLAN_FORMATS[:-1]:
        raise UsageError(
            f"--format {kind} is not for a plan, which --from {source} is: give one of "
            f"{', '.join(_PLAN_FORMATS[:-1])}"
        )
    if (Path(source).expanduser() / "cfg.json").is_file() and kind not in _SAE_FORMATS:
        raise UsageError(
            f"--format {kind} is not for an SAE, which --from {source} is: give one of "
            f"{', '.join(_SAE_FORMATS)}, or make a plan of it with rank"
        )
    with reserved(args, locked=False, **{"from": source, "activations": args.activations}):
        with reporting(args) as report:
            if kind in _SAE_FORMATS:
                found = _convert_sae(args, source, kind, report)
            else:
                found = _convert_plan(args, source, kind, report)
    if args.json:
        print_json(found)
    elif kind in _SAE_FORMATS:
        _print_sae(found, args.out)
    else:
        _print_notes(found)
    return 0


def _convert_sae(args: Namespace, source: str, kind: str, report: Report) -> Document:
    from saesteer.checkpoints.conversion import convert

    report.say(f"reading {source}")
    rows = None if args.activations is None else _activations(args, source)
    folder = None if args.out is None else take_folder(args)
    found = convert(
        source,
        folder,
        kind,
        dtype=None if args.dtype == "auto" else args.dtype,
        canonical=args.canonical,
        jumprelu=args.jumprelu,
        activations=rows,
        seed=args.seed or 0,
    )
    if folder is not None:
        write_run(folder, "convert", vars(args), report=found)
    return found


def _activations(args: Namespace, source: str) -> "Tensor":
    from saesteer.checkpoints.sae_file import load_sae
    from saesteer.checkpoints.shards import ShardReader

    shards = ShardReader(args.activations)
    layer = args.layer
    if layer is None and len(shards.layers) > 1:
        layer = load_sae(source).spec.layer
    rows, _ = shards.shard(0, *shards.place(layer))
    return rows


def _convert_plan(args: Namespace, source: str, kind: str, report: Report) -> Document:
    from saesteer.steering.exchange import conversion as exchange

    need(args, "--out", "the folder to write, as --to DIR")
    if kind == "plan":
        from saesteer.sae.model.language_model import load_model

        need(args, "--model", "the model that the vectors are for")
        exchange.read_blocks(source)  # refuses another file before the model is loaded
        lm = load_model(
            args.model,
            device=args.device,
            progress=report.say,
            trust_remote_code=args.trust_remote_code,
        )
        return exchange.import_vectors(source, lm, take_folder(args))
    from saesteer.steering.plans.plan_file import load_plan

    plan = load_plan(source)
    exchange.check_export(plan, kind, as_scope=args.as_scope)
    return exchange.export_plan(
        plan, take_folder(args), kind, as_scope=args.as_scope, hookpoint=args.hookpoint
    )


def _is_plan(source: str) -> bool:
    path = Path(source).expanduser()
    return path.name == "plan.yaml" or (path / "plan.yaml").is_file()


def _print_sae(found: Document, out: Path | None) -> None:
    spec = found["spec"]
    widths = f"d_model {spec['d_model']}, d_sae {spec['d_sae']}"
    print(f"{found['source']}: {found['format_from']}, {spec['architecture']}, {widths}")
    parts = [part for part in ("random", "real") if part in found]
    rows = [
        [name, *(number(found[part][name]) for part in parts), meaning]
        for name, meaning in _FIGURES.items()
    ]
    headers = ["figure", *(f"{part} rows" for part in parts), "meaning"]
    print_table(headers, rows, left="figure,meaning")
    if "sae_lens" in found:
        theirs = found["sae_lens"]
        print(
            f"sae_lens {theirs['version']} opens it and differs by "
            f"{number(theirs['latents_relative'])} (latents) and "
            f"{number(theirs['reconstruction_relative'])} (reconstruction)"
        )
    print(f"allowed: {number(found['tolerance'])}; dtype {spec['dtype']}")
    for note in found["notes"]:
        print(f"note: {note}")
    if out is not None:
        print(f"written to {out} ({found['format_to']})")


def _print_notes(found: Document) -> None:
    for note in found["notes"]:
        print(f"note: {note}")
    for path in found["files"]:
        print(f"written to {path}")
