"""Write an instruction task of your own, and see whether the model follows it when told to.

    python examples/own_task.py

Steering cannot be expected to work where the model fails when asked, so try this before training.
`rank`, `calibrate` and `evaluate` take the file wherever they take the name of a built-in task.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from saesteer.sae import load_model
from saesteer.steering import Decoding, builtin_tasks, evaluate, load_task

TASK = """\
name: numbered
instruction: Answer with a numbered list.
variants:
  # The instruction and these choose latents; those with `use: evaluate` are kept for evaluation.
  - {text: "Give me a numbered list.", lang: en}
  - {text: "Réponds par une liste numérotée.", lang: fr}
  - {text: "Please number the points of your answer.", lang: en, use: evaluate}
# Without `contents` the built-in sentences are used. These are split into train, dev and test.
contents:
  - How do I make tea?
  - What should I pack for the mountains?
  - How can I learn the names of birds?
  - What makes a good bicycle lock?
  - How do I keep bread fresh?
  - What should I ask before renting a flat?
  - How does a library sort its books?
  - What belongs in a first-aid kit?
check:
  name: bullets
  arguments: {minimum: 2, numbers: true}
max_new_tokens: 64
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--n", type=int, default=3, help="test contents to answer")
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "numbered.yaml"
        file.write_text(TASK, encoding="utf-8")
        task = load_task(file)
    print(f"built in: {', '.join(builtin_tasks())}")
    print(f"{task.name}: { ({split: len(texts) for split, texts in task.contents.items()}) }")

    # A check is a program; it is pure, so try it on answers of your own first.
    good, bad = "1. Boil water.\n2. Wait.", "Boil water, then wait."
    source = task.contents["train"][0]
    print(f"a good answer: {task.verdict(good, source).value}")
    print(f"a bad answer: {task.verdict(bad, source).value}")

    # Without a plan, evaluate compares the content alone with the content and the instruction.
    lm = load_model(args.model)
    for arm in evaluate(lm, task, {}, n=args.n, decoding=Decoding(temperature=0.0)):
        print(f"{arm.name}: follows {arm.follows}, strict {arm.strict}")
        for answer in arm.answers:
            print(f"  {'strict' if answer.grades.strict else '-'}  {answer.output[:80]!r}")


if __name__ == "__main__":
    main()
