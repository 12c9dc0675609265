"""Find the latents that carry an instruction, and write a steering plan with the best of them.

python examples/rank.py --task french --read reply     (latents that carry the instruction out)
python examples/rank.py --task french --read last      (latents that recognise it: the paper)
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from saesteer.checkpoints import load_sae
from saesteer.sae import load_model
from saesteer.steering import RankConfig, plan_from_ranking, rank, save_plan


def show(stage: str, done: int, total: int, note: str) -> None:
    print(f"\r{stage}: {done} of {total} {note}   ", end="", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--sae", default="runs/example/sae", help="folder or RELEASE:ID")
    parser.add_argument("--task", default="french", help="a built-in name or a task.yaml")
    parser.add_argument("--read", default="reply", help="last, template, span or reply")
    parser.add_argument("--by", help="saif, rate, auroc, fused, ...: see docs/ranking.md")
    parser.add_argument("--drop", nargs="*", default=(), help="dense template duplicate fdr")
    parser.add_argument("--contents", type=int, default=48, help="train contents to use")
    parser.add_argument("--top", type=int, default=15, help="latents in the plan")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/example/plan"))
    args = parser.parse_args(argv)

    lm = load_model(args.model)
    sae = load_sae(args.sae, device=lm.device)
    config = RankConfig(read=args.read, by=args.by, drop=tuple(args.drop), contents=args.contents)
    ranking = rank(lm, sae, args.task, config, progress=show)
    print(file=sys.stderr)

    if ranking.replies_used:
        passed, answered = ranking.replies_used
        print(f"{passed} of {answered} instructed replies follow the instruction and count")
    print(f"{ranking.positives} positive and {ranking.negatives} negative samples")

    # The plan holds what steering needs, directions included: it works without the SAE.
    plan = plan_from_ranking(lm, sae, ranking, top=args.top)
    for latent in plan.latents:
        columns = ranking.explain(latent.id)  # every statistic of one latent
        print(
            f"latent {latent.id:5}  {config.resolved_by} {latent.score:.3f}  "
            f"on {columns['rate_positive']:.2f} against {columns['rate_negative']:.2f}  "
            f"mu {latent.mu:.2f}  q {columns['q']:.1e}  {' '.join(map(repr, latent.lens))}"
        )
    for name, agreement in ranking.stability.agreement.items():
        print(f"over {name}, the top {ranking.stability.k} share {agreement.jaccard:.2f}")
    print(f"plan: {save_plan(plan, args.out)}")


if __name__ == "__main__":
    main()
