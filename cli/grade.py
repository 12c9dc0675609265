"""`saesteer grade`: grade answers made anywhere."""

import json
import textwrap
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saesteer.checkpoints.errors import UserError
from saesteer.cli.flags import add_common, add_dictionaries, add_model, need
from saesteer.cli.inputs import lines_of, open_model, reserved, take_folder
from saesteer.cli.output import Document, number, print_json, print_table, with_flags, write_run
from saesteer.cli.parser import VerbParser
from saesteer.cli.progress import reporting

if TYPE_CHECKING:
    from saesteer.steering.grades.grade import Grader, Grades

EXAMPLE = "saesteer grade --task french --answers answers.jsonl"
NEEDED = "--task NAME --answers FILE"


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    what = parser.add_argument_group("what is graded")
    what.add_argument(
        "--task", metavar="NAME/FILE", help="a built-in task, or a task.yaml with a check"
    )
    what.add_argument(
        "--answers",
        metavar="FILE",
        help="JSON lines with `content` (what the instruction was applied to) and `answer`; - for "
        "stdin (needed)",
    )
    add_dictionaries(what)
    add_model(what, "that judges naturalness as well, unsteered (default: none, words alone)")
    add_common(
        parser,
        out="folder for grades.jsonl and grades.json (default: print only)",
        force="replace earlier grades in --out",
        seed_help=None,
    )


def run(args: Namespace) -> int:
    """Grade, and print a line of JSON an answer, or a table of rates."""
    need(args, "--task", "the task whose instruction the answers should follow")
    need(args, "--answers", "a file of JSON lines with content and answer")
    with reserved(args, answers=args.answers, task=args.task), reporting(args) as report:
        from saesteer.steering.grades.grade import make_grader
        from saesteer.steering.tasks.task import load_task

        task = load_task(args.task)
        contents, answers = read_answers(args.answers)
        lm = None if args.model is None else open_model(args, report)
        grader = make_grader(task, contents, lm, args.dictionaries, progress=report)
        grades = grader.grade(contents, answers)
        rows: list[Document] = [
            {"content": content, "answer": answer, **grade.row()}
            for content, answer, grade in zip(contents, answers, grades, strict=True)
        ]
        summary = summarise(task.name, grades, grader)
        if args.out is not None:
            _write(take_folder(args), args, rows, summary)
    if args.json:
        for row in rows:
            print_json(row, one_a_line=True)
    else:
        _print(summary, args)
    return 0


def read_answers(name: str) -> tuple[list[str], list[str]]:
    """The contents and answers of a file of JSON lines.

    Raises UserError for a file that cannot be read, or a line that is not such an object.
    """
    contents: list[str] = []
    answers: list[str] = []
    for place, line in lines_of(name, "--answers", "answer"):
        where = f"--answers {name}, line {place}"
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{where} is no JSON object: give content and answer on each line")
        for key, into in (("content", contents), ("answer", answers)):
            if not isinstance(row.get(key), str):
                held = json.dumps(row[key])[:40] if key in row else "missing"
                raise UserError(f"{where}: key {key!r} is {held}, and must be a text")
            into.append(row[key])
    return contents, answers


def summarise(task: str, grades: "Sequence[Grades]", grader: "Grader") -> Document:
    """The rate of each grade with Wilson's interval, and what could not be graded."""
    from saesteer.steering.evaluation.rates import Rate
    from saesteer.steering.grades.grade import GRADES, not_graded

    rates: dict[str, Any] = {}
    for name in GRADES:
        known = [bool(hit) for one in grades if (hit := one.grade(name)) is not None]
        rates[name] = Rate.of(known).triple if known else None
    return {
        "task": task,
        "n": len(grades),
        "language": grader.lang,
        **rates,
        "not_graded": not_graded(grades),
        "thresholds": grader.floors(),
    }


def _write(folder: Path, args: Namespace, rows: Sequence[Document], summary: Document) -> None:
    from saesteer.checkpoints.files import plain, write_json, write_text

    lines = [json.dumps(plain(row), ensure_ascii=False) for row in rows]
    write_text(folder / "grades.jsonl", "\n".join(lines) + "\n")
    write_json(folder / "grades.json", summary)
    write_run(folder, "grade", vars(args))


def _print(summary: Document, args: Namespace) -> None:
    from saesteer.steering.grades.grade import DEFINITIONS, GRADES

    print(f"{summary['task']}: {summary['n']} answers, graded by programs")
    rows = []
    for name in GRADES:
        found = summary[name]
        rate = "–" if found is None else number(found[0], 3)
        interval = "" if found is None else f"[{found[1]:.2f}, {found[2]:.2f}]"
        rows.append([name, rate, interval])
    print_table(["grade", "rate", "95 % interval"], rows, "grade,95 % interval")
    for name, meaning in DEFINITIONS.items():
        print(textwrap.fill(f"{name}: {meaning}", 92, subsequent_indent="   "))
    for name, why in summary["not_graded"].items():
        print(f"{name}: {with_flags(why)}")
    if args.out is not None:
        print(f"written to {args.out / 'grades.jsonl'} and {args.out / 'grades.json'}")
