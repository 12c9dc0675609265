"""Train a sparse autoencoder, live from a model or from shards on disk.

    python examples/train.py --replies french
    python examples/train.py --activations runs/example/activations

An SAE that never saw the model follow an instruction has no latent for it. So `--replies` lets the
model answer prompts with that instruction (and without) first, and trains on the answers too.
Shards hold what they were harvested from: give `--replies` to `examples/harvest.py` then.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from saesteer.sae import TextConfig, TrainConfig, load_model, train
from saesteer.steering import reply_prompts


def show(stage: str, done: int, total: int, note: str) -> None:
    print(f"\r{stage}: {done} of {total} {note}   ", end="", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--activations", type=Path, help="shards to train on, without a model")
    parser.add_argument("--layer", type=int, help="default: two thirds of the way up")
    parser.add_argument("--replies", nargs="*", default=["french"], metavar="TASK")
    parser.add_argument("--reply-contents", type=int, default=48)
    parser.add_argument("--d-sae", type=int, help="latents; default: 8 times d_model")
    parser.add_argument("--k", type=int, default=32, help="latents kept per token")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/example/sae"))
    parser.add_argument("--force", action="store_true", help="replace an earlier SAE in --out")
    args = parser.parse_args(argv)

    widths = () if args.d_sae is None else (args.d_sae,)
    if args.activations is not None:
        config = TrainConfig(
            d_sae=widths, k=(args.k,), tokens=args.tokens, batch_tokens=args.batch_tokens
        )
        runs = train(
            args.out, config, activations=args.activations, force=args.force, progress=show
        )
    else:
        lm = load_model(args.model)
        prompts = reply_prompts(args.replies, contents=args.reply_contents)
        config = TrainConfig(
            layers=(2 * lm.n_layers // 3 if args.layer is None else args.layer,),
            d_sae=widths,
            k=(args.k,),
            tokens=args.tokens,
            batch_tokens=args.batch_tokens,
            # Half of the contexts hold replies, which repeat as often as it takes.
            text=TextConfig(context=args.context, replies_share=0.5, epochs=8),
        )
        runs = train(
            args.out,
            config,
            model=lm,
            replies=[prompt.text for prompt in prompts],
            force=args.force,
            progress=show,
        )
    print(file=sys.stderr)

    # One SAE per combination of layers, widths, k and seeds: here a single one.
    for run in runs:
        sae, final = run["sae"], run["final"]
        print(f"layer {sae['layer']}, {sae['d_sae']} latents, k {sae['k']}: {run['folder']}")
        dead = f"{100 * final['dead_fraction']:.1f} %"
        print(f"FVU {final['fvu']:.3f}, L0 {final['l0']:.1f}, dead {dead}")


if __name__ == "__main__":
    main()
