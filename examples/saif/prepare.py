"""The SAEs that the experiments need: the model's replies, activations of some layers, training.

    python examples/saif/prepare.py -o runs/saif

With published SAEs there is nothing to prepare: give `run.py` their names with --sae.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from saesteer.sae import HarvestConfig, TextConfig, TrainConfig, harvest, load_model, train
from saesteer.steering import reply_prompts

TASKS = ["french", "german", "json", "question", "python"]


def show(stage: str, done: int, total: int, note: str) -> None:
    print(f"\r{stage}: {done} of {total} {note}   ", end="", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="instructions to answer")
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 20, 29])
    parser.add_argument("--widths", type=int, nargs="+", default=[2304, 4608])
    parser.add_argument("--contents", type=int, default=32, help="contents a task answers")
    parser.add_argument("--tokens", type=int, default=120_000, help="activations of a layer")
    parser.add_argument("--train-tokens", type=int, default=300_000)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/saif"))
    args = parser.parse_args(argv)

    lm = load_model(args.model)
    prompts = reply_prompts(args.tasks, contents=args.contents, plain=2)
    text = TextConfig(epochs=2, replies_share=0.45, context=args.context)
    harvest(
        lm,
        args.out / "activations",
        HarvestConfig(layers=tuple(args.layers), tokens=args.tokens, text=text),
        replies=[prompt.text for prompt in prompts],
        replies_folder=args.out / "replies",
        progress=show,
    )
    print(file=sys.stderr)
    trained = train(
        args.out / "sae",
        TrainConfig(
            d_sae=tuple(args.widths),
            k=(args.k,),
            tokens=args.train_tokens,
            batch_tokens=args.batch_tokens,
        ),
        activations=args.out / "activations",
        progress=show,
    )
    print(file=sys.stderr)
    for made in trained:
        print(f"{made['folder']}: FVU {made['final']['fvu']:.3f}, L0 {made['final']['l0']:.1f}")


if __name__ == "__main__":
    main()
