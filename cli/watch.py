"""`saesteer watch`: the curves of a training run in the terminal, while it goes on."""

import contextlib
import shutil
import sys
import time
from argparse import Namespace
from typing import TYPE_CHECKING

from saesteer.cli.flags import add_listing
from saesteer.cli.output import is_terminal, print_json
from saesteer.cli.parser import VerbParser

if TYPE_CHECKING:
    from saesteer.sae.reports.curves import RunCurves

EXAMPLE = "saesteer watch runs/sae --once"
NEEDED = "RUN..."

_SECONDS = 2.0


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    what = parser.add_argument_group("what is watched")
    what.add_argument(
        "run",
        metavar="RUN",
        nargs="+",
        help="folder that train writes; several are compared (needed)",
    )
    what.add_argument(
        "--once",
        action="store_true",
        help="print the present state and end (default: go on until the run is finished; off a "
        "terminal, once)",
    )
    what.add_argument(
        "--page",
        metavar="FILE",
        help="also write the curves as an HTML page (default: none; train keeps training.html in "
        "its folder)",
    )
    add_listing(parser)


def run(args: Namespace) -> int:
    """Show the curves, until the run is finished or for once."""
    from saesteer.sae.reports.curves import read_curves

    curves = read_curves(args.run)
    if args.page is not None:
        _write_page(args.page, curves)
    if args.json:
        print_json({"complete": curves.complete, "tokens": curves.tokens, "logs": curves.logs})
    elif args.once or not is_terminal(sys.stdout):
        print("\n".join(_lines(curves, shutil.get_terminal_size().columns)))
    else:
        with contextlib.suppress(KeyboardInterrupt):
            _follow(args)
    return 0


def _follow(args: Namespace) -> None:
    from rich.live import Live
    from rich.text import Text

    from saesteer.sae.reports.curves import read_curves

    with Live(auto_refresh=False) as live:
        while True:
            curves = read_curves(args.run)
            lines = _lines(curves, live.console.width)
            live.update(Text("\n".join(lines), no_wrap=True, overflow="crop"), refresh=True)
            if args.page is not None:
                _write_page(args.page, curves)
            if curves.complete:
                return
            time.sleep(_SECONDS)


def _write_page(path: str, curves: "RunCurves") -> None:
    from saesteer.checkpoints.files import write_text
    from saesteer.sae.reports.curves import training_page

    write_text(path, training_page(curves))


def _lines(curves: "RunCurves", width: int) -> list[str]:
    """The latest values of every SAE with a line of blocks each, `width` columns wide."""
    from saesteer.sae.reports.curves import CURVES, figure, progress_text, spark_line

    lines = [progress_text(curves)]
    title = max(len(curve.title) for curve in CURVES)
    for name, rows in curves.logs.items():
        lines += ["", name]
        for curve in CURVES:
            values = [row[curve.key] for row in rows if row.get(curve.key) is not None]
            if values:
                shown = figure(values[-1])
                room = max(8, min(60, width - title - 16))
                lines.append(
                    f"  {curve.title.ljust(title)} {shown.rjust(10)}  {spark_line(values, room)}"
                )
    return lines
