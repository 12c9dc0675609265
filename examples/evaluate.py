"""Choose the dose of a plan on development contents, then measure it on test contents.

    python examples/evaluate.py --plan runs/example/plan --task french

Three disjoint splits: latents were chosen on train contents, the dose on dev, the figures on test.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from saesteer.sae import load_model
from saesteer.steering import Decoding, Grid, calibrate, evaluate, load_plan, load_task, save_plan


def show(stage: str, done: int, total: int, note: str) -> None:
    print(f"\r{stage}: {done} of {total} {note}   ", end="", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--plan", default="runs/example/plan", help="folder that rank wrote")
    parser.add_argument("--task", default="french", help="a built-in name or a task.yaml")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 5, 15], help="latents to try")
    parser.add_argument("--scale", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    parser.add_argument("--dev", type=int, default=12, help="development contents")
    parser.add_argument("--n", type=int, default=40, help="test contents")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/example/evaluation"))
    args = parser.parse_args(argv)

    lm = load_model(args.model)
    task = load_task(args.task)
    decoding = Decoding(temperature=0.0)  # greedy; the same for every arm

    plan, trials = calibrate(
        lm,
        task,
        load_plan(args.plan),
        Grid(k=tuple(args.k), scale=tuple(args.scale)),
        rounds=((args.dev, 1),),
        decoding=decoding,
        progress=show,
    )
    print(file=sys.stderr)
    for trial in trials:
        row, rate = trial.row(), trial.arm.success
        print(f"k {row['k']:2}, scale {row['scale']:g}: {trial.arm.measure} {rate.value:.2f}")
    print(f"chosen: k {len(plan.latents)}, scale {plan.scale:g}")

    # Compared with the plan: the content alone, and the content with the instruction.
    arms = evaluate(lm, task, {"steered": plan}, n=args.n, decoding=decoding, progress=show)
    print(file=sys.stderr)
    for arm in arms:
        print(f"{arm.name:10} follows {arm.follows}  fluent {arm.fluent}  strict {arm.strict}")

    save_plan(plan, args.out / "plan")
    report = [{**arm.summary(), "answers": [a.row() for a in arm.answers]} for arm in arms]
    text = json.dumps(report, ensure_ascii=False, indent=1)
    (args.out / "report.json").write_text(text, encoding="utf-8")
    print(f"plan and every answer: {args.out}")


if __name__ == "__main__":
    main()
