"""An instruction vector found by patching becomes a plan, its latents another; both are graded.

    python examples/mechanisms/vector_to_plan.py --sae runs/sae --task french --out runs/road

Train an SAE of the layer first (examples/train.py, `saesteer train`). The plans are graded beside
the mean difference of the instruction, on contents that nothing else has seen.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from saesteer.checkpoints import load_sae
from saesteer.mechanisms import (
    VectorConfig,
    instruction_vectors,
    load_pairs,
    patch_latents,
    save_latents,
)
from saesteer.sae import load_model
from saesteer.steering import Decoding, evaluate, load_task, mean_difference, save_plan
from saesteer.steering.plans.plan import TaskIdentity
from saesteer.steering.tasks.task import compose


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--sae", required=True, help="an SAE of the residual stream")
    parser.add_argument("--task", default="french")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--n", type=int, default=12, help="contents to grade on")
    parser.add_argument("--out", type=Path, default=Path("runs/road"))
    args = parser.parse_args(argv)

    # Patches need float32: the effect of a vector is a small difference of logits.
    lm = load_model(args.model, dtype="float32")
    sae = load_sae(args.sae)
    task = load_task(args.task)
    pairs = load_pairs(f"task:{args.task}", n=args.pairs)

    # The state of the instruction's last token, put at the last token of the content alone.
    config = VectorConfig(at="last", taken="full", layers=(sae.spec.layer,), chat=True)
    vector = instruction_vectors(lm, pairs, config, drop=True)
    latents = patch_latents(lm, pairs, sae, config, drop=True)
    print(vector)
    print(latents)

    identity = TaskIdentity(task.name, task.hash, task.wordings)
    contents = task.contents["train"][: args.pairs]
    plans = {
        "vector": vector.plan(lm, sae.spec.layer, task=identity),
        "latents": latents.plan(lm, sae, task=identity),
        "mean difference": mean_difference(
            lm, [compose(text, task.instruction) for text in contents], contents,
            layer=sae.spec.layer, read="template",
        ),
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    save_latents(args.out, latents)
    for name, plan in plans.items():
        save_plan(plan, args.out / name.replace(" ", "-"))

    for arm in evaluate(lm, task, plans, n=args.n, decoding=Decoding(temperature=0.0)):
        print(f"{arm.name:15} follows {arm.follows}  fluent {arm.fluent}")
    print(f"plans and figures: {args.out}")


if __name__ == "__main__":
    main()
