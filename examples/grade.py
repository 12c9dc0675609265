"""Grade answers made anywhere: do they follow the instruction, fluently and faithfully.

    python examples/grade.py --task question

Reads JSON lines with `content` and `answer`; without a file it grades three answers of its own.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from saesteer.steering import grade, load_task

CONTENT = "The cook tasted the sauce, frowned and reached for the vinegar."
ANSWERS = (
    "Why did the cook reach for the vinegar after tasting the sauce?",  # good
    "Why do you think that people are happy when the weather is good?",  # about something else
    "Why the of cook vinegar a tasted sauce the reached?",  # no sentence
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="question", help="a built-in name or a task.yaml")
    parser.add_argument("--answers", type=Path, help="a file of JSON lines")
    parser.add_argument("--model", help="a model that judges naturalness as well, unsteered")
    parser.add_argument("--dictionaries", help="folder of dictd dictionaries, for translations")
    args = parser.parse_args(argv)

    rows = [{"content": CONTENT, "answer": answer} for answer in ANSWERS]
    if args.answers is not None:
        lines = args.answers.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    grades = grade(
        load_task(args.task),
        [row["content"] for row in rows],
        [row["answer"] for row in rows],
        model=args.model,
        dictionaries=args.dictionaries,
    )
    for row, one in zip(rows, grades, strict=True):
        print(f"{row['answer'][:70]}")
        print(f"  follows {one.follows}, fluent {one.fluent}, faithful {one.faithful}")
        why = " ".join(part.reason for part in (one.fluency, one.faithfulness) if part.reason)
        print(f"  strict {one.strict}" + (f": {why}" if why else ""))


if __name__ == "__main__":
    main()
