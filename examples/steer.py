"""Steer a model with a plan, so that it follows an instruction that is not in the prompt.

python examples/steer.py --plan runs/example/plan --scale 2 -p "The bridge is closed on Monday."
"""

import argparse
from collections.abc import Sequence

from saesteer.sae import load_model
from saesteer.steering import generate_steered, load_plan, steer


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--plan", default="runs/example/plan", help="folder that rank wrote")
    parser.add_argument("-p", "--prompt", default="The bridge is closed on Monday.")
    parser.add_argument("--scale", type=float, help="multiple of every dose; default: the plan's")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    args = parser.parse_args(argv)

    lm = load_model(args.model)
    plan = load_plan(args.plan)
    print(f"{len(plan.latents)} latents at layer {plan.layer}, scope {plan.scope}")

    # Texts in, texts out: chat template, batches, and the unsteered text for comparison.
    (text,) = generate_steered(
        lm,
        [args.prompt],
        plan,
        scale=args.scale,
        max_new_tokens=args.max_new_tokens,
        baseline=True,
    )
    print(f"unsteered: {text.baseline}")
    print(f"steered:   {text.completion}")
    print(f"touched {text.tokens_touched} positions, relative dose {text.relative_dose:.2f}")

    # The same by hand, around the model's own `generate` with any of its options.
    inputs = lm.tokenizer(args.prompt, return_tensors="pt").to(lm.device)
    with steer(lm, plan, scale=args.scale) as report:
        ids = lm.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
            pad_token_id=lm.pad_id,
        )
    new = ids[0, inputs["input_ids"].shape[1] :]
    print(f"as plain text: {lm.tokenizer.decode(new, skip_special_tokens=True)}")
    print(f"touched {report.tokens_touched} positions")


if __name__ == "__main__":
    main()
