"""Compare a plan with every control on test contents, and write the report of it.

    python examples/report.py --plan runs/example/plan -o runs/example/report

Controls: the prompt alone, random latents, the mean-difference vector and a constant logit bias.
"""

import argparse
import sys
from collections.abc import Sequence

from saesteer.sae import load_model
from saesteer.steering import CompareConfig, evaluate_plans, plans_by_task


def show(stage: str, done: int, total: int, note: str) -> None:
    print(f"\r{stage}: {done} of {total} {note}   ", end="", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--plan", nargs="+", default=["runs/example/plan"], help="folders of rank")
    parser.add_argument("--task", help="default: the task that each plan was ranked for")
    parser.add_argument("--n", type=int, default=40, help="test contents")
    parser.add_argument("-o", "--out", default="runs/example/report")
    args = parser.parse_args(argv)

    groups = plans_by_task(args.plan, args.task)
    found = evaluate_plans(load_model(args.model), groups, CompareConfig(n=args.n), progress=show)
    print(file=sys.stderr)
    for one in found.comparisons:
        for test in one.tests:
            if test.measure != "follows":
                gap = f"{test.difference:+.2f} [{test.low:+.2f}, {test.high:+.2f}]"
                print(f"{one.task.name}: {test.ours} - {test.theirs}: {gap}, p {test.p_holm:.2g}")
    for warning in found.warnings:
        print(f"note: {warning}")
    found.save(args.out)
    print(f"every figure and answer: {args.out}/report.html")


if __name__ == "__main__":
    main()
