"""`saesteer metrics`: measure an SAE on held-out text."""

from argparse import Namespace
from pathlib import Path

from saesteer.cli.flags import add_common, add_documents, add_sae, add_text, default, given, need
from saesteer.cli.inputs import check_reading, open_model, open_sae, reserved, take_folder
from saesteer.cli.output import Document, amount, number, print_json, print_table, write_run
from saesteer.cli.parser import VerbParser
from saesteer.cli.progress import reporting
from saesteer.cli.values import count
from saesteer.sae.config import MetricsConfig, TextConfig

EXAMPLE = "saesteer metrics --sae runs/sae --model smollm2-135m-instruct --data held-out.jsonl"

_FIGURES = {
    "fvu": "fraction of variance unexplained",
    "l0": "active latents per token",
    "ce_recovered": "cross-entropy recovered, against mean ablation",
    "ce_plain": "cross-entropy of the model, nats per token",
    "ce_spliced": "with the reconstruction",
    "ce_ablated": "with the mean activation",
    "kl": "KL(plain || spliced), nats per token",
}


_SEEN = "this text was in the SAE's training: give --data held-out text for unbiased figures"


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    what = parser.add_argument_group("what is measured")
    add_sae(what)
    text = parser.add_argument_group("held-out text")
    add_text(text, epochs=False, replies=False)
    add_documents(text)
    work = parser.add_argument_group("measurement")
    work.add_argument(
        "--tokens",
        type=count,
        metavar="N",
        help=f"measure on at least N tokens, in whole batches {default(MetricsConfig, 'tokens')}",
    )
    work.add_argument(
        "--bootstrap",
        type=count,
        metavar="N",
        help="bootstrap resamples of the documents for each interval "
        f"{default(MetricsConfig, 'bootstrap')}",
    )
    add_common(
        parser,
        out="folder for metrics.json (default: print only)",
        force="accept a model with other weights than the SAE was trained on; replace results in "
        "--out",
    )


def run(args: Namespace) -> int:
    """Measure, and print a table."""
    config = MetricsConfig(text=TextConfig(**given(args, TextConfig)), **given(args, MetricsConfig))
    need(args, "--sae", "the SAE to measure, a folder or RELEASE:ID")
    with reserved(args, model=args.model, sae=args.sae, data=args.data), reporting(args) as report:
        from saesteer.sae import metrics

        check_reading(args)
        sae = open_sae(args, report)
        lm = open_model(args, report, name=sae.spec.model_name)
        sae = sae.to(lm.device)
        found = metrics(
            sae, lm, config, layer=args.layer, site=args.site, force=args.force, progress=report
        )
        if found["seen_in_training"]:
            report.warn(_SEEN)
        if found["trained_with_bos"] not in (None, found["prepend_bos"]):
            with_it = found["trained_with_bos"]
            report.warn(
                f"the SAE was trained {'with' if with_it else 'without'} BOS in front of contexts "
                f"and is measured {'without' if with_it else 'with'}: give --bos "
                f"{'always' if with_it else 'never'}"
            )
        if args.out is not None:
            _write(take_folder(args), args, found)
    if args.json:
        print_json(found)
    else:
        _print_table(found, args.out)
    return 0


def _write(folder: Path, args: Namespace, found: Document) -> None:
    from saesteer.checkpoints.files import write_json

    write_run(folder, "metrics", vars(args), model=found["model"], sae=found["sae"])
    write_json(folder / "metrics.json", found)


def _print_table(found: Document, out: Path | None) -> None:
    rows = []
    for name, meaning in _FIGURES.items():
        figure = found[name]
        interval = f"[{number(figure['low'])}, {number(figure['high'])}]"
        rows.append([name, number(figure["value"]), interval, meaning])
    dead = f"latents that never fired on {amount(found['tokens'])} tokens"
    rows.insert(2, ["dead_fraction", number(found["dead_fraction"]), "", dead])
    print_table(
        ["figure", "value", "95 % interval", "meaning"], rows, left="figure,95 % interval,meaning"
    )
    excluded = found["excluded"]
    print(
        f"layer {found['layer']} ({found['site']}), {amount(found['tokens'])} tokens of "
        f"{amount(found['documents'])} documents; left out {amount(excluded['special'])} special "
        f"tokens and {amount(excluded['sinks'])} attention sinks"
    )
    if excluded["template"]:
        print(f"left out {amount(excluded['template'])} tokens of the chat template")
    if found["seen_in_training"]:
        print(_SEEN)
    if out is not None:
        print(f"written to {out / 'metrics.json'}")
