"""`saesteer harvest`: run text through a model once and store activations in shards."""

import contextlib
from argparse import Namespace
from pathlib import Path

from saesteer.cli.flags import (
    SITE_HELP,
    add_common,
    add_model,
    add_reading,
    add_text,
    default,
    given,
    need,
)
from saesteer.cli.inputs import check_reading, open_model, reply_texts, reserved
from saesteer.cli.output import Document, amount, duration, print_json, print_next, size
from saesteer.cli.parser import VerbParser
from saesteer.cli.progress import Report, reporting
from saesteer.cli.values import count, layers, stored_dtype
from saesteer.sae.config import HarvestConfig, TextConfig

EXAMPLE = "saesteer harvest --layer 20 --data corpus.jsonl --tokens 1000000 -o runs/activations"
NEEDED = "--layer L -o DIR"


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    place = parser.add_argument_group("model")
    add_model(place)
    place.add_argument(
        "--layer",
        type=layers,
        metavar="L,...",
        help="blocks to read: 20, or 10,20, or 8-12, or -1 for the last (needed)",
    )
    place.add_argument(
        "--site", metavar="SITE", help=f"{SITE_HELP} {default(HarvestConfig, 'site')}"
    )
    text = parser.add_argument_group("text")
    add_text(text, epochs=True, replies=True)
    add_reading(text)
    work = parser.add_argument_group("harvest")
    work.add_argument(
        "--tokens",
        type=count,
        metavar="N",
        help=f"activations to keep {default(HarvestConfig, 'tokens')}",
    )
    work.add_argument(
        "--store-dtype",
        type=stored_dtype,
        metavar="TYPE",
        help="float32, bfloat16 or float16 on disk (default: bfloat16; float32 for a model in "
        "float32)",
    )
    work.add_argument(
        "--shard-tokens",
        type=count,
        metavar="N",
        help=f"activations in one file {default(HarvestConfig, 'shard_tokens')}",
    )
    work.add_argument("--shuffle", action="store_true", help="shuffle the rows within each shard")
    work.add_argument(
        "--keep-positions",
        action="store_true",
        help="also store each row's position and the number of its context",
    )
    work.add_argument(
        "--rank-timeout",
        type=count,
        metavar="SECONDS",
        help="under torchrun: how long processes wait for each other before they fail "
        f"{default(HarvestConfig, 'rank_timeout')}",
    )
    work.add_argument(
        "--resume",
        action="store_true",
        help="continue the harvest in --out after its last complete shard",
    )
    work.add_argument(
        "--dry-run",
        action="store_true",
        help="predict time, disk space and memory, and write nothing",
    )
    add_common(
        parser,
        out="folder for manifest.json and the shards (needed)",
        force="replace an earlier harvest in --out",
    )


def run(args: Namespace) -> int:
    """Harvest, and say what was stored."""
    text = TextConfig(**given(args, TextConfig))
    need(args, "--layer", "the blocks to store, such as --layer 20")
    config = HarvestConfig(layers=args.layer, text=text, **given(args, HarvestConfig))
    if args.dry_run:
        return _dry_run(args, config)
    need(args, "--out", "the folder for the shards")
    from saesteer.sae.runs.processes import is_first

    first = is_first()  # under torchrun, only the first process prints and reserves the folder
    args.quiet = args.quiet or not first
    folder = reserved(args, locked=False, model=args.model, data=args.data)
    with folder if first else contextlib.nullcontext(), reporting(args) as report:
        check_reading(args)
        replies = reply_texts(args)
        from saesteer.sae import harvest

        lm = open_model(args, report)
        manifest = harvest(
            lm,
            args.out,
            config,
            replies=replies,
            resume=args.resume,
            force=args.force,
            consume_model=True,
            progress=report,
            warn=report.warn if first else lambda message: None,
        )
    if args.json and first:
        print_json(manifest)
    elif first:
        _print_summary(args.out, manifest, report)
    return 0


def _print_summary(folder: Path, manifest: Document, report: Report) -> None:
    shards = manifest["shards"]
    filled = sum((folder / shard["file"]).stat().st_size for shard in shards)
    blocks = ", ".join(str(layer) for layer in manifest["layers"])
    excluded = manifest["excluded"]
    speed = report.rate("harvest")
    print(
        f"stored {amount(manifest['tokens'])} tokens of layer {blocks} "
        f"({', '.join(manifest['sites'])}, d_model {manifest['d_model']}) in {folder}"
    )
    print(
        f"left out {amount(excluded['special'])} special tokens and {amount(excluded['sinks'])} "
        "attention sinks"
    )
    if excluded.get("template"):
        print(f"left out {amount(excluded['template'])} tokens of the chat template")
    several = "" if len(shards) == 1 else "s"
    print(f"{len(shards)} shard{several}, {size(filled)}, {manifest['dtype']}")
    if speed is not None:
        print(f"{amount(speed)} tokens/s, {duration(report.seconds['harvest'])}")
    print_next("train", "--activations", folder, "-o", "runs/sae")


def _dry_run(args: Namespace, config: HarvestConfig) -> int:
    with reporting(args) as report:
        check_reading(args)
        texts = reply_texts(args)
        lm = open_model(args, report)
        from saesteer.sae.runs.harvest_prediction import predict_harvest

        plan = {**predict_harvest(lm, config, report), "replies": len(texts)}
    folder = None if args.out is None else Path(args.out).expanduser()
    plan["out"] = folder
    plan["out_in_use"] = bool(folder and folder.is_dir() and any(folder.iterdir()))
    if args.json:
        print_json(plan)
        return 0
    blocks = ", ".join(map(str, plan["layers"]))
    print(f"would store {amount(plan['tokens'])} tokens of layer {blocks} ({plan['site']})")
    compiled = ", compiled" if plan["compile"] else ""
    print(f"  model     {plan['model']}, {plan['model_dtype']}, {plan['device']}{compiled}")
    print(f"  text      {', '.join(plan['data'])}")
    print(
        f"            {amount(plan['contexts'])} contexts of {plan['context']} tokens, "
        f"{plan['batch_size']} at once"
    )
    if texts:
        print(f"            after {amount(len(texts))} replies of the model, not timed here")
    print(f"  disk      {size(plan['bytes'])} in {plan['store_dtype']}")
    print(f"  memory    {size(plan['memory_bytes'])}, {size(plan['model_bytes'])} of them weights")
    print(
        f"  time      {duration(plan['seconds'])} at {amount(plan['tokens_per_second'])} tokens/s"
    )
    in_use = " (in use: needs --resume or --force)" if plan["out_in_use"] else ""
    print(f"  folder    {folder or 'none: give --out'}{in_use}")
    return 0
