"""`saesteer patch`: which token, block or head carries a difference between two prompts."""

from argparse import BooleanOptionalAction, Namespace
from pathlib import Path

from saesteer.cli.flags import add_common, add_model, default, given, need
from saesteer.cli.inputs import open_model, reserved, take_folder
from saesteer.cli.output import Document, number, print_json, print_table, write_run
from saesteer.cli.parser import VerbParser
from saesteer.cli.progress import reporting
from saesteer.cli.values import count, counts, layers, names
from saesteer.cli.values import number as a_number
from saesteer.mechanisms.config import FAST, HEAD_SITES, METRICS, RESIDUAL_SITES, PatchConfig

EXAMPLE = (
    "saesteer patch --model runs/hand/model --pairs runs/hand/scenes.jsonl --site z "
    "--at last,object -o runs/patch"
)
NEEDED = "--pairs FILE"
_SHOWN = 15


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    data = parser.add_argument_group("pairs")
    add_model(data)
    data.add_argument(
        "--pairs",
        metavar="FILE",
        help=".jsonl with clean, corrupt, answer, wrong, positions, group; or boxes:N, "
        "contrast:adjectives, contrast:animals, task:NAME (needed)",
    )
    data.add_argument(
        "--against",
        metavar="TASK",
        help="with task:NAME: another task on the same contents (default: the contents alone)",
    )
    data.add_argument("--n", type=count, default=100, metavar="N", help="pairs (default: 100)")
    data.add_argument(
        "--chat",
        action=BooleanOptionalAction,
        help="send texts through the chat template (default: off)",
    )
    data.add_argument(
        "--allow-copies",
        action="store_true",
        default=None,
        help="accept answers that begin with the query's own token",
    )
    grid = parser.add_argument_group("grid")
    grid.add_argument(
        "--site",
        type=names,
        metavar="SITE,...",
        help=f"what is patched: {', '.join((*RESIDUAL_SITES, *HEAD_SITES))} "
        f"{default(PatchConfig, 'sites')}",
    )
    grid.add_argument(
        "--at",
        type=names,
        metavar="NAME,...",
        help="positions: first, last, a name of the pairs (NAME-first, NAME-last), or all "
        f"{default(PatchConfig, 'at')}",
    )
    grid.add_argument("--layer", type=layers, metavar="L,...", help="blocks (default: all)")
    grid.add_argument("--head", type=counts, metavar="H,...", help="query heads (default: all)")
    grid.add_argument(
        "--direction",
        choices=("noise", "denoise"),
        metavar="WAY",
        help="noise: corrupt values into the clean run; denoise: clean values into the corrupt run "
        f"{default(PatchConfig, 'direction')}",
    )
    grid.add_argument(
        "--metric",
        choices=METRICS,
        metavar="NAME",
        help=f"{', '.join(METRICS)} (default: logit-diff where pairs have a wrong answer, else "
        "logprob)",
    )
    work = parser.add_argument_group("work")
    work.add_argument(
        "--fast",
        choices=FAST,
        metavar="HOW",
        help="estimate by gradients: atp, atp* or ig; some nodes are patched exactly as well, to "
        "show how far off it is (default: exact)",
    )
    work.add_argument(
        "--verify",
        type=count,
        metavar="N",
        help=f"with --fast: largest nodes to patch exactly {default(PatchConfig, 'verify')}",
    )
    work.add_argument(
        "--checks",
        type=count,
        metavar="N",
        help="with --fast: more nodes to patch exactly, over quantiles "
        f"{default(PatchConfig, 'checks')}",
    )
    work.add_argument(
        "--ig-steps",
        type=count,
        metavar="N",
        help=f"with --fast ig: points of the line {default(PatchConfig, 'ig_steps')}",
    )
    work.add_argument(
        "--budget",
        type=a_number,
        metavar="MINUTES",
        help="refuse a grid that would take longer, as predicted from its first batches "
        f"{default(PatchConfig, 'budget_minutes')}",
    )
    add_common(
        parser,
        out="folder for report.json, report.html, effects.safetensors and run.json (default: "
        "print only)",
        force="replace earlier results in --out",
        seed_help="seed of the pairs that are made and of resampling (default: 0)",
        dtype_help="arithmetic of the language model: auto, float32, bfloat16 or float16 (default: "
        "auto, float32 here: differences of logits are small)",
    )


def run(args: Namespace) -> int:
    """Patch, and print the largest effects."""
    need(args, "--pairs", "pairs of prompts, or a maker such as contrast:animals")
    config = PatchConfig(
        **given(args, PatchConfig, sites="site", layers="layer", heads="head",
                budget_minutes="budget")
    )  # fmt: skip
    with reserved(args, model=args.model, pairs=args.pairs), reporting(args) as report:
        from saesteer.mechanisms import load_pairs, patch, save_patch

        made = not Path(args.pairs).is_file()
        pairs = load_pairs(args.pairs, n=args.n, against=args.against, seed=config.seed)
        lm = open_model(args, report, dtype="float32" if args.dtype == "auto" else args.dtype)
        result = patch(lm, pairs, config, drop=made, progress=report)
        if args.out is None:
            document = result.document()
        else:
            folder = take_folder(args)
            document = save_patch(folder, result)
            write_run(folder, "patch", vars(args), model=document["model"])
        for text in result.warnings():
            report.warn(text)
    if args.json:
        print_json(document)
    else:
        _print(args, document)
    return 0


def _print(args: Namespace, document: Document) -> None:
    best = sorted(document["cells"], key=lambda cell: -abs(cell["effect"]))[:_SHOWN]
    rows = [
        [
            cell["name"],
            number(cell["effect"]),
            "-" if cell["low"] is None else f"[{number(cell['low'])}, {number(cell['high'])}]",
            "-" if cell["share"] is None else f"{cell['share']:.2f}",
            number(cell["p_adjusted"], 2),
            "exact" if cell["exact"] else document["settings"]["fast"],
        ]
        for cell in best
    ]
    print_table(
        ["node", "effect", "95 % interval", "share", "p adjusted", "how"],
        rows,
        left="node,95 % interval,how",
    )
    settings = document["settings"]
    print(
        f"{document['metric']} {number(document['base'])} unpatched, "
        f"{number(document['source'])} in the other run ({settings['direction']}); "
        f"{document['n_pairs']} pairs in {document['n_groups']} groups, "
        f"{len(document['cells'])} nodes"
    )
    if document["agreement"]:
        found = document["agreement"]
        print(
            f"{settings['fast']} against exact on {found['nodes']} nodes: Pearson "
            f"{number(found['pearson'], 2)}, Spearman {number(found['spearman'], 2)}, sign "
            f"{number(found['sign'], 2)}"
        )
    if args.out is not None:
        print(f"written to {args.out / 'report.html'}")
