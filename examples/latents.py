"""Read what the latents of an SAE are: look at some, and write their pages.

python examples/latents.py --sae runs/example/sae --out runs/example/latents
"""

import argparse
from collections.abc import Sequence

from saesteer.sae import LatentsConfig, TextConfig, latents, save_latents


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--sae", default="runs/example/sae", help="folder or RELEASE:ID")
    parser.add_argument("--data", default="python-docs")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--top", type=int, default=50)
    parser.add_argument("--out", default="runs/example/latents")
    args = parser.parse_args(argv)

    text = TextConfig(data=(args.data,), context=args.context)
    found = latents(
        args.sae, args.model, LatentsConfig(tokens=args.tokens, top=args.top, steer=5, text=text)
    )

    for card in [found[latent] for latent in found.ids[:3]]:  # a notebook shows `found[9]` itself
        best = card.top[0]
        before, after = "".join(best.tokens[: best.index]), "".join(best.tokens[best.index + 1 :])
        print(f"latent {card.id}: density {card.density:.2%}, {card.description.text}")
        print(
            f"  strongest ({best.act:.3g}): {(before[-40:], best.tokens[best.index], after[:40])}"
        )
    print(f"page: {save_latents(found, args.out)['page']}")


if __name__ == "__main__":
    main()
