"""`saesteer harvest`: text through a model once, activations into shards."""

import math
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UsageError
from saesteer.cli.flags import SITE_HELP, add_common, add_model, add_text, default, given, need
from saesteer.cli.inputs import check_data, open_model, reply_texts, reserved
from saesteer.cli.output import amount, duration, print_json, print_next, size
from saesteer.cli.parser import VerbParser
from saesteer.cli.progress import Report, reporting
from saesteer.cli.values import count, layers, stored_dtype
from saesteer.sae.config import HarvestConfig, TextConfig

EXAMPLE = "saesteer harvest --layer 20 --data corpus.jsonl --tokens 1000000 -o runs/activations"

# The first batch pays for warming up; three more are steady enough to predict minutes.
_TIMED_BATCHES = 3


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    place = parser.add_argument_group("model")
    add_model(place)
    place.add_argument(
        "--layer", type=layers, metavar="L,...",
        help="blocks whose output is stored: 20, 10,20, 8-12, -1 for the last (needed)",
    )  # fmt: skip
    place.add_argument(
        "--site", metavar="SITE", help=f"{SITE_HELP} {default(HarvestConfig, 'site')}"
    )
    text = parser.add_argument_group("text")
    add_text(text, epochs=True, replies=True)
    work = parser.add_argument_group("harvest")
    work.add_argument(
        "--tokens", type=count, metavar="N",
        help=f"activations to keep {default(HarvestConfig, 'tokens')}",
    )  # fmt: skip
    work.add_argument(
        "--store-dtype", type=stored_dtype, metavar="TYPE",
        help="float32, bfloat16 or float16 on disk (default: bfloat16; float32 for a model in "
        "float32)",
    )  # fmt: skip
    work.add_argument(
        "--resume", action="store_true",
        help="go on after the last whole shard of the harvest in --out",
    )  # fmt: skip
    work.add_argument(
        "--dry-run", action="store_true",
        help="say what would be done, how long it takes and what it fills; write nothing",
    )  # fmt: skip
    add_common(
        parser,
        out="folder for manifest.json and the shards (needed)",
        force="replace an earlier harvest in --out",
    )


def run(args: Namespace) -> int:
    """Harvest, and say what was stored."""
    text = TextConfig(**given(args, TextConfig))
    wanted = need(args, "--layer", "the blocks to store, such as --layer 20")
    config = HarvestConfig(layers=wanted, text=text, **given(args, HarvestConfig))
    if args.dry_run:
        return _dry_run(args, config)
    need(args, "--out", "the folder for the shards")
    with reserved(args, model=args.model, data=args.data), reporting(args) as report:
        check_data(args)
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
            progress=report,
            warn=report.warn,
        )
    if args.json:
        print_json(manifest)
    else:
        _print_summary(args.out, manifest, report)
    return 0


def _print_summary(folder: Path, manifest: dict[str, Any], report: Report) -> None:
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
    print(f"{len(shards)} shards, {size(filled)}, {manifest['dtype']}")
    if speed is not None:
        print(f"{amount(speed)} tokens/s, {duration(report.seconds['harvest'])}")
    print_next("train", "--activations", folder, "-o", "runs/sae")


def _dry_run(args: Namespace, config: HarvestConfig) -> int:
    with reporting(args) as report:
        check_data(args)
        texts = reply_texts(args)
        lm = open_model(args, report)
        plan = _predict(lm, config, report, len(texts))
    folder = None if args.out is None else Path(args.out).expanduser()
    plan["out"] = folder
    plan["out_in_use"] = bool(folder and folder.is_dir() and any(folder.iterdir()))
    if args.json:
        print_json(plan)
        return 0
    blocks = ", ".join(map(str, plan["layers"]))
    print(f"would store {amount(plan['tokens'])} tokens of layer {blocks} ({plan['site']})")
    print(f"  model     {plan['model']}, {plan['model_dtype']}, {plan['device']}")
    print(f"  text      {', '.join(plan['data'])}")
    print(f"            {amount(plan['contexts'])} contexts of {plan['context']} tokens")
    if texts:
        print(f"            after {amount(len(texts))} replies of the model, not timed here")
    print(f"  disk      {size(plan['bytes'])} in {plan['store_dtype']}")
    print(
        f"  time      {duration(plan['seconds'])} at {amount(plan['tokens_per_second'])} tokens/s"
    )
    in_use = " (in use: needs --resume or --force)" if plan["out_in_use"] else ""
    print(f"  folder    {folder or 'none: give --out'}{in_use}")
    return 0


def _predict(lm: Any, config: HarvestConfig, report: Report, replies: int) -> dict[str, Any]:
    """Run a few batches and count from them to the whole harvest. Writes nothing."""
    import torch

    from saesteer.checkpoints.model_files import cache_folder
    from saesteer.sae.harvester import open_activations
    from saesteer.sae.hooks import resolve_site

    points = [resolve_site(lm, layer, config.site) for layer in config.layers]
    stream = open_activations(lm, points, config.text, replies_folder=cache_folder())
    batches = kept = read = 0
    started = time.monotonic()
    for batch in stream:
        report("dry run", batches, _TIMED_BATCHES + 1, "batches")
        batches += 1
        read += len(batch.token_ids)
        if batches == 1:
            started = time.monotonic()
        else:
            kept += len(batch.token_ids)
        if batches > _TIMED_BATCHES:
            break
    if not kept:  # a corpus of one batch
        raise UsageError(
            "--dry-run needs two batches of text to time: give more --data or a lower --batch-size"
        )
    speed = kept / max(time.monotonic() - started, 1e-9)
    report("dry run", batches, batches, "batches")
    native = "float32" if lm.dtype == torch.float32 else "bfloat16"
    stored = config.store_dtype or native
    # Each token is d_model numbers and an int32 id, in the folder of every layer.
    row = lm.d_model * getattr(torch, stored).itemsize + 4
    contexts = config.tokens / (read / (batches * config.text.batch_size))
    return {
        "model": lm.name,
        "model_dtype": str(lm.dtype).removeprefix("torch."),
        "device": str(lm.device),
        "layers": [point.layer for point in points],
        "site": config.site,
        "data": list(config.text.data),
        "replies": replies,
        "tokens": config.tokens,
        "context": config.text.context,
        "contexts": math.ceil(contexts),
        "store_dtype": stored,
        "bytes": config.tokens * row * len(points),
        "tokens_per_second": speed,
        "seconds": config.tokens / speed,
    }
