"""Put the printout of a demo into README.md, so that nobody types it: `make readme-demo`.

    saesteer demo -o runs/demo > runs/demo.txt
    python docs/put_demo.py runs/demo.txt --demo runs/demo/demo.json

What stands between the two marks of README.md is replaced: a sentence about the run, from its
record, and the printout with one of its example contents.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- begin demo: written by docs/put_demo.py -->", "<!-- end demo -->"
SHOWN = 1
"""Example contents that stay."""


def section(printout: str, record: dict[str, Any], command: str) -> str:
    """What stands between the marks."""
    if not record["complete"]:
        raise SystemExit("the demo did not run to its end: demo.json says complete: false")
    model = record["stages"]["model"]
    weights = ", so every figure is of de-quantised 4-bit weights" if "q4" in model["name"] else ""
    machine, versions = record["machine"], record["versions"]
    threads = machine["threads"]
    threads = f"{threads} thread{'' if threads == 1 else 's'}"
    about = (
        f"What `{command}` printed on {record['date']}, with {threads} of {machine['processor']} "
        f"({machine['cpu_capability']}), saesteer {versions['saesteer']} and torch "
        f"{versions['torch']}. The model was {model['name']} in {model['dtype']}{weights}."
    )
    return f"{about}\n\n```\n{trimmed(printout)}\n```"


def trimmed(printout: str) -> str:
    """The printout with the first example contents only, and a line that says what was left out."""
    if "\x1b" in printout:
        raise SystemExit("the printout holds colours: redirect it into a file, without a terminal")
    lines = printout.strip("\n").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Side by side"))
    stop = next(i for i, line in enumerate(lines) if line.startswith("Rates"))
    # A content is indented by three and follows an empty line.
    contents = [
        i for i in range(start + 1, stop) if not lines[i - 1] and re.match(r" {3}\S", lines[i])
    ]
    if len(contents) <= SHOWN:
        return "\n".join(lines)
    left = len(contents) - SHOWN
    note = f"   (... {left} more content{'' if left == 1 else 's'} ...)"
    return "\n".join([*lines[: contents[SHOWN]], note, "", *lines[stop:]])


def put(readme: str, new: str) -> str:
    """README.md with the section in its place."""
    start, end = readme.find(BEGIN), readme.find(END)
    if start < 0 or end < start:
        raise SystemExit(f"README.md does not hold the marks {BEGIN} and {END}")
    return f"{readme[:start]}{BEGIN}\n{new}\n{readme[end:]}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("printout", type=Path, help="what the demo wrote to stdout")
    parser.add_argument("--demo", type=Path, required=True, help="the demo.json of the same run")
    parser.add_argument("--command", default="make demo", help="how it was started")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    args = parser.parse_args(argv)
    record = json.loads(args.demo.read_text(encoding="utf-8"))
    new = section(args.printout.read_text(encoding="utf-8"), record, args.command)
    text = put(args.readme.read_text(encoding="utf-8"), new)
    args.readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
