"""Find which attention heads carry the difference between two instructions, and draw a map.

python examples/patch.py --pairs contrast:animals --n 12 --out runs/patch
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from saesteer.mechanisms import PatchConfig, patch, save_patch


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--pairs", default="contrast:animals", help="a .jsonl file or a maker")
    parser.add_argument("--n", type=int, default=12, help="pairs")
    parser.add_argument("--out", type=Path, help="folder for the map and the figures")
    args = parser.parse_args(argv)

    config = PatchConfig(sites=("z",), at=("last",))
    result = patch(args.model, args.pairs, config, n=args.n)
    print(result)
    for row in sorted(result.summary, key=lambda row: row["effect"])[:5]:
        share = "" if row["share"] is None else f", {row['share']:.0%} of the whole difference"
        print(f"{row['name']}: {row['effect']:+.3f} {result.metric}{share}")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        save_patch(args.out, result)
        print(f"see {args.out / 'report.html'}")


if __name__ == "__main__":
    main()
