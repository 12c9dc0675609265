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
NEEDED = "--sae DIR"

_FIGURES = {
    "fvu": "fraction of variance unexplained",
    "l0": "active latents per token",
    "ce_recovered": "cross-entropy recovered, against mean ablation",
    "ce_recovered_zero": "against zero ablation, as SAELens and SAEBench print it",
    "ce_plain": "cross-entropy of the model, nats per token",
    "ce_spliced": "with the reconstruction",
    "ce_ablated": "with the mean activation",
    "ce_zero": "with zeros",
    "ce_increase": "ce_spliced - ce_plain, nats per token",
    "kl": "KL(plain || spliced), nats per token",
    "cosine": "of activation and reconstruction, mean over tokens",
    "relative_norm": "length of the reconstruction over the activation's, mean over tokens",
    "shrinkage": "what the reconstruction has to be multiplied by to fit best",
    "token_error": "squared error over squared length, mean over tokens",
    "ev_legacy": "not 1 - fvu: mean over tokens of 1 - error / deviation",
    "ev_about_zero": "not 1 - fvu: 1 - error / squared length, flattered by a mean",
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
    work.add_argument(
        "--against",
        metavar="SAE",
        help="an SAE of another seed (a folder or RELEASE:ID): how far both have learnt the same "
        "directions (default: not measured)",
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
    read = {"model": args.model, "sae": args.sae, "data": args.data, "against": args.against}
    with reserved(args, **read), reporting(args) as report:
        from saesteer.checkpoints.sae_file import load_sae
        from saesteer.sae import metrics

        check_reading(args)
        against = None if args.against is None else load_sae(args.against, setting="against")
        sae = open_sae(args, report)
        lm = open_model(args, report, name=sae.spec.model_name)
        sae = sae.to(lm.device)
        found = metrics(
            sae,
            lm,
            config,
            against=against,
            layer=args.layer,
            site=args.site,
            force=args.force,
            progress=report,
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


def _places(found: Document) -> str:
    """The places that figures are of: a crosscoder's all, a transcoder's the one it writes."""
    read = f"layer {found['layer']} ({found['site']})"
    writes = [f"layer {layer} ({site})" for layer, site in found.get("writes") or ()]
    if len(writes) > 1:
        return " and ".join(writes)
    return f"read at {read}, measured at {writes[0]}" if writes else read


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
    _print_latents(found)
    excluded = found["excluded"]
    print(
        f"{_places(found)}, {amount(found['tokens'])} tokens of "
        f"{amount(found['documents'])} documents; left out {amount(excluded['special'])} special "
        f"tokens and {amount(excluded['sinks'])} attention sinks"
    )
    if excluded["template"]:
        print(f"left out {amount(excluded['template'])} tokens of the chat template")
    if found["seen_in_training"]:
        print(_SEEN)
    if out is not None:
        print(f"written to {out / 'metrics.json'}")


def _print_latents(found: Document) -> None:
    """What the table has no room for: a line each."""
    quantiles = ", ".join(f"{name} {value}" for name, value in found["l0_quantiles"].items())
    print(f"l0 over tokens: {quantiles}")
    dense = found["dense_latents"]
    print(
        f"latents: {amount(found['dead_latents'])} dead; {amount(dense['above_0.1'])} fire on more "
        f"than 10 % of the tokens, {amount(dense['above_0.01'])} on more than 1 %"
    )
    histogram = found["density_histogram"]
    bins = zip(histogram["log10_from"], histogram["latents"], strict=True)
    print("latents by log10 of their firing rate: " + ", ".join(f"{at:g}: {n}" for at, n in bins))
    if projection := found["decoder_projection"]:
        print(
            f"decoder projection (n = {projection['n']}): {number(projection['value'])}; among "
            "SAEs of this width and place, the least suggests the right L0"
        )
    if same := found["stability"]:
        print(
            f"against {same['source']}: mean cosine of {amount(same['pairs'])} matched latents "
            f"{number(same['matched_cosine'])}, {number(100 * same['matched_share'])} % above 0.7"
        )
