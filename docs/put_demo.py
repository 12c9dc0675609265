"""Put the printout of a demo into README.md, so that nobody types it: `make readme-demo`.

    saesteer demo -o runs/demo > runs/demo.txt
    python docs/put_demo.py runs/demo.txt --demo runs/demo/demo.json

What stands between the two marks of README.md is replaced: a sentence about the run, which has to
have been made on this machine, and the printout with one of each task's example contents.
"""

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- begin demo: written by docs/put_demo.py -->", "<!-- end demo -->"
SHOWN = 1
"""Example contents that stay."""


def section(printout: str, record: dict[str, Any], command: str, today: str) -> str:
    """What stands between the marks; the machine is the one that this runs on."""
    if not record["complete"]:
        raise SystemExit("the demo did not run to its end: demo.json says complete: false")
    import torch  # noqa: F401 (`machine` tells its threads only where it is loaded)

    from saesteer.checkpoints.provenance import machine, versions

    model, computer, software = record["stages"]["model"], machine(), versions()
    weights = ", so every figure is of de-quantised 4-bit weights" if "q4" in model["name"] else ""
    threads = computer["threads"]
    about = (
        f"What `{command}` printed on {today}, with {threads} thread{'' if threads == 1 else 's'} "
        f"of {computer['processor']} ({computer['cpu_capability']}), saesteer "
        f"{software['saesteer']} and torch {software['torch']}. The model was {model['name']} in "
        f"{model['dtype']}{weights}."
    )
    return f"{about}\n\n```\n{trimmed(printout)}\n```"


def trimmed(printout: str) -> str:
    """The printout with the first of the example contents that stand together, and a line that
    says how many were left out."""
    if "\x1b" in printout:
        raise SystemExit("the printout holds colours: redirect it into a file, without a terminal")
    kept: list[str] = []
    shown = left = 0
    for block in re.split(r"\n[ \t]*\n", printout.strip("\n")):
        if _EXAMPLE.search(block):
            shown += 1
            if shown > SHOWN:
                left += 1
                continue
        else:
            if left:
                kept.append(f"   (... {left} more content{'' if left == 1 else 's'} ...)")
            shown = left = 0
        kept.append(block)
    return "\n\n".join(kept)


_EXAMPLE = re.compile(r"^ {3}\S.*\[.*\]\n {6}\S", flags=re.M)
"""An arm with its grades, and below it the answer."""


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
    today = time.strftime("%Y-%m-%d")
    new = section(args.printout.read_text(encoding="utf-8"), record, args.command, today)
    text = put(args.readme.read_text(encoding="utf-8"), new)
    args.readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
