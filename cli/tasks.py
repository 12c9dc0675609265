"""`saesteer tasks`: the instruction tasks that come with the package."""

from argparse import Namespace

from saesteer.cli.flags import add_listing
from saesteer.cli.output import Document, print_json, print_table
from saesteer.cli.parser import VerbParser

EXAMPLE = "saesteer tasks"


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    add_listing(parser)


def run(args: Namespace) -> int:
    """Print every task's name, instruction, check, wordings and contents by split."""
    from saesteer.steering import builtin_tasks, load_task

    found: list[Document] = [
        {
            "name": task.name,
            "instruction": task.instruction,
            "check": task.check_name,
            "wordings": len(task.wordings),
            "contents": {split: len(texts) for split, texts in task.contents.items()},
        }
        for task in map(load_task, builtin_tasks())
    ]
    if args.json:
        print_json(found)
        return 0
    print_table(
        ["task", "check", "wordings", "contents", "instruction"],
        [
            [
                task["name"],
                task["check"] or "-",
                str(task["wordings"]),
                " ".join(f"{split} {count}" for split, count in task["contents"].items()),
                task["instruction"],
            ]
            for task in found
        ],
        left="task,check,contents,instruction",
    )
    return 0
