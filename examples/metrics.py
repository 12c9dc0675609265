"""Measure an SAE on text: what it reconstructs, and what its errors do to the model.

python examples/metrics.py --sae runs/example/sae
"""

import argparse
from collections.abc import Sequence

from saesteer.sae import MetricsConfig, TextConfig, metrics


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--sae", default="runs/example/sae", help="folder or RELEASE:ID")
    parser.add_argument("--data", default="python-docs", help="for figures to quote: unseen text")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--context", type=int, default=256)
    args = parser.parse_args(argv)

    # Another seed than that of training draws other documents first.
    text = TextConfig(data=(args.data,), context=args.context, seed=1)
    found = metrics(args.sae, args.model, MetricsConfig(tokens=args.tokens, text=text))

    print(f"layer {found['layer']}, {found['tokens']} tokens of {found['documents']} documents")
    for name, meaning in (
        ("fvu", "fraction of variance unexplained"),
        ("l0", "active latents per token"),
        ("ce_recovered", "cross-entropy recovered, against mean ablation"),
        ("kl", "KL(model || model with reconstruction), nats per token"),
    ):
        figure = found[name]  # with its 95 % bootstrap interval over documents
        interval = f"[{figure['low']:.3f}, {figure['high']:.3f}]"
        print(f"{name:13} {figure['value']:8.3f} {interval}  {meaning}")
    print(f"dead          {found['dead_fraction']:8.3f}  share of latents that never fired here")


if __name__ == "__main__":
    main()
