"""`saesteer formats`: the file formats that are read and written."""

from argparse import Namespace

from saesteer.cli.flags import add_listing
from saesteer.cli.output import print_json, print_table
from saesteer.cli.parser import VerbParser

EXAMPLE = "saesteer formats"


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    add_listing(parser)


def run(args: Namespace) -> int:
    """Print every format with what it holds and whether it can be read and written."""
    from saesteer.checkpoints.formats import READERS, WRITERS
    from saesteer.steering.exchange.conversion import EXPORTS

    # `saesteer` is written as an extended SAELens folder, and read back as one.
    saes = [
        {
            "format": name,
            "holds": "SAE",
            "read": name in READERS or name == "saesteer",
            "written": name in WRITERS,
        }
        for name in dict.fromkeys([*READERS, *WRITERS])
    ]
    plans = [
        {"format": name, "holds": "steering plan", "read": True, "written": True}
        for name in ("plan", *EXPORTS)
    ]
    found = [*saes, *plans]
    if args.json:
        print_json(found)
        return 0
    print_table(
        ["format", "holds", "read", "written"],
        [
            [str(row["format"]), str(row["holds"]), _yes(row["read"]), _yes(row["written"])]
            for row in found
        ],
        left="format,holds,read,written",
    )
    print("an SAE's format is found by its files; `saesteer convert` writes another one")
    return 0


def _yes(value: object) -> str:
    return "yes" if value else "-"
