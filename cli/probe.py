"""`saesteer probe`: do a model's states tell tasks apart, and does its answer follow them?"""

from argparse import BooleanOptionalAction, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from saesteer.checkpoints.errors import UsageError
from saesteer.cli.flags import add_common, add_model, default, given
from saesteer.cli.inputs import open_model, reserved
from saesteer.cli.output import Document, number, print_json, print_table
from saesteer.cli.parser import VerbParser
from saesteer.cli.progress import reporting
from saesteer.cli.reading_files import keep_reading
from saesteer.cli.values import count, names
from saesteer.cli.values import number as a_number
from saesteer.mechanisms.reading_config import ProbeConfig

if TYPE_CHECKING:
    from saesteer.sae.model.language_model import LanguageModel

EXAMPLE = "saesteer probe --model smollm2-135m-instruct --tasks french,question -o runs/probe"
NEEDED = "(--tasks NAME,... | --states FILE)"
_KEYS = ("ari_label", "within", "ari_group", "ari_input", "purity")


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    data = parser.add_argument_group("states")
    add_model(data)
    data.add_argument(
        "--models",
        metavar="DIR",
        help="with --cluster: a folder of checkpoints, each a model, in the order of their names",
    )
    data.add_argument(
        "--states",
        metavar="FILE",
        help=".jsonl with text, label, group, and if wanted input, split, answers, positions "
        "(default with --models: states.jsonl beside that folder)",
    )
    data.add_argument(
        "--tasks",
        type=names,
        metavar="NAME,...",
        help="instead: every wording of these built-in tasks on the same contents",
    )
    data.add_argument(
        "--contents", type=count, default=8, metavar="N", help="with --tasks: how many (default: 8)"
    )
    data.add_argument(
        "--at",
        type=names,
        default=("instruction", "last"),
        metavar="NAME,...",
        help="positions: last, or names of the states (default: instruction,last)",
    )
    data.add_argument(
        "--site",
        metavar="SITE",
        help=f"resid_post, attn_out or mlp_out {default(ProbeConfig, 'site')}",
    )
    data.add_argument(
        "--chat",
        action=BooleanOptionalAction,
        help="send texts through the chat template (default: off)",
    )
    what = parser.add_argument_group("what is done")
    what.add_argument(
        "--cluster",
        action="store_true",
        help="k-means over layers and checkpoints, instead of a classifier",
    )
    what.add_argument(
        "--move",
        action="store_true",
        help="move states from one label's centroid to another's: does the answer follow?",
    )
    what.add_argument(
        "--folds",
        type=count,
        metavar="N",
        help=f"folds, which keep groups apart {default(ProbeConfig, 'folds')}",
    )
    what.add_argument(
        "--penalty",
        type=a_number,
        metavar="C",
        help=f"inverse strength of the classifier's penalty {default(ProbeConfig, 'penalty')}",
    )
    what.add_argument(
        "--shuffles",
        type=count,
        metavar="N",
        help=f"fits with permuted labels {default(ProbeConfig, 'shuffles')}",
    )
    what.add_argument(
        "--n-init",
        type=count,
        metavar="N",
        help=f"with --cluster: starts of k-means {default(ProbeConfig, 'n_init')}",
    )
    what.add_argument(
        "--seeds",
        type=count,
        metavar="N",
        help=f"with --cluster: repetitions of k-means {default(ProbeConfig, 'seeds')}",
    )
    what.add_argument(
        "--draws",
        type=count,
        metavar="N",
        help=f"with --move: random shifts beside each {default(ProbeConfig, 'draws')}",
    )
    add_common(
        parser,
        out="folder for report.json, report.html and run.json (default: print only)",
        force="replace earlier results in --out",
        seed_help="seed of folds, shuffles, k-means and contents (default: 0)",
    )


def run(args: Namespace) -> int:
    """Read the states, and print what they tell."""
    if args.cluster and args.move:
        raise UsageError("give --cluster or --move, not both: each has its own report")
    if args.models is not None and not args.cluster:
        raise UsageError("--models is for --cluster: give --model")
    source = args.states
    if source is None and args.models is not None:
        source = str(Path(args.models).expanduser().resolve().parent / "states.jsonl")
    if (source is None) == (args.tasks is None):
        raise UsageError("give either --states FILE or --tasks NAME,NAME")
    config = ProbeConfig(**given(args, ProbeConfig))
    with (
        reserved(args, model=args.model, models=args.models, states=source),
        reporting(args) as report,
    ):
        from saesteer.mechanisms import (
            cluster,
            move_centroids,
            probe,
            read_state_rows,
            task_states,
        )

        rows = (
            read_state_rows(source)
            if source is not None
            else task_states(args.tasks, args.contents, config.seed)
        )
        models = _checkpoints(args.models) if args.models is not None else []
        if args.models is None:
            models = [open_model(args, report)]
        more = {"at": args.at, "device": args.device, "dtype": args.dtype, "progress": report}
        result = (
            cluster(models, rows, config, **more) if args.cluster
            else move_centroids(models[0], rows, config, **more) if args.move
            else probe(models[0], rows, config, **more)
        )  # fmt: skip
        document = keep_reading(args, "probe", result)
    if args.json:
        print_json(document)
        return 0
    _print(document)
    if args.out is not None:
        print(f"written to {args.out / 'report.html'}")
    return 0


def _checkpoints(folder: str) -> "list[str | LanguageModel]":
    found = sorted(path for path in Path(folder).expanduser().glob("*/") if path.is_dir())
    found = [path for path in found if (path / "config.json").is_file()]
    if not found:
        raise UsageError(f"--models {folder} holds no folder with a model (config.json)")
    return [*map(str, found)]


def _print(document: Document) -> None:
    if document["kind"] == "probe":
        keys = ("accuracy", "permuted", "selectivity")
        print_table(
            ["at", "layer", *keys],
            [[r["at"], str(r["layer"]), *(number(r[k], 2) for k in keys)]
             for r in document["rows"]],
            left="at",
        )  # fmt: skip
        print(
            f"{document['n_rows']} states in {document['n_groups']} groups; bag of words "
            f"{document['bag_of_words']:.2f}, mean embedding {document['mean_embedding']:.2f}"
        )
        return
    shown = _KEYS if document["kind"] == "clusters" else ("switched", "kept", "random")
    last = document["rows"][-1].get("model")
    print_table(
        ["at", "layer", *shown],
        [
            [r["at"], str(r["layer"]), *(number(r[key], 2) for key in shown)]
            for r in document["rows"]
            if r.get("model") == last
        ],
        left="at",
    )
    for row in document.get("accuracy", ())[-1:]:
        told = ", ".join(f"{split} {row[split]:.2f}" for split in row if split != "model")
        print(f"accuracy of {row['model']}: {told}")
