"""Run text through a model once and keep the activations of one block on disk.

    python examples/harvest.py --layer 20 --tokens 100000 --replies french

`examples/train.py --activations runs/example/activations` then trains on them as often as you like,
without the model. The shards are plain safetensors files: any tool can read them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file

from saesteer.sae import HarvestConfig, TextConfig, harvest
from saesteer.steering import reply_prompts


def show(stage: str, done: int, total: int, note: str) -> None:
    """Progress, on stderr. Every long call takes such a function; leave it out for silence."""
    print(f"\r{stage}: {done} of {total} {note}   ", end="", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--layer", type=int, default=-1, help="negative counts from the end")
    parser.add_argument("--data", default="python-docs", help="file, folder or hf:DATASET")
    parser.add_argument("--replies", nargs="*", default=[], metavar="TASK")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/example/activations"))
    parser.add_argument("--force", action="store_true", help="replace an earlier harvest in --out")
    args = parser.parse_args(argv)

    # With --replies the model answers these texts first, and what it says joins the corpus.
    prompts = [prompt.text for prompt in reply_prompts(args.replies)]
    manifest = harvest(
        args.model,
        args.out,
        HarvestConfig(
            layers=(args.layer,),  # several blocks cost little more than one
            tokens=args.tokens,
            text=TextConfig(data=(args.data,), context=args.context),
        ),
        replies=prompts,
        force=args.force,
        progress=show,
    )
    print(file=sys.stderr)

    print(f"{manifest['tokens']} activations of width {manifest['d_model']} in {args.out}")
    print(f"left out: {manifest['excluded']}")  # special tokens and attention sinks

    # One shard, read without saesteer.
    (layer,) = manifest["layers"]
    shard = load_file(sorted((args.out / f"layer-{layer}").glob("*.safetensors"))[0])
    activations, token_ids = shard["activations"], shard["token_ids"]
    norms = activations.float().norm(dim=1)
    print(f"first shard of layer {layer}: {tuple(activations.shape)} {activations.dtype}")
    print(f"median norm {norms.median():.3g}, first tokens {token_ids[:5].tolist()}")


if __name__ == "__main__":
    main()
