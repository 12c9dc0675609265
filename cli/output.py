"""How verbs print: tables, colours, numbers for people, JSON, and one-line errors."""

import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from saesteer.checkpoints import files
from saesteer.checkpoints.errors import UserError

Document = dict[str, Any]
"""A JSON document, or a part of one, as the library's calls return it."""


@runtime_checkable
class Stream(Protocol):
    """What text is written to: stdout, stderr, or an `io.StringIO`."""

    def write(self, text: str, /) -> int: ...

    def flush(self) -> None: ...

    def isatty(self) -> bool: ...


Colour = Literal["bold", "dim", "red", "green", "yellow", "cyan"]
_COLOURS: dict[Colour, str] = {
    "bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"
}  # fmt: skip


def paint(text: str, colour: Colour, stream: Stream | None = None) -> str:
    """`text` in a colour; as it is where the stream is no terminal, or NO_COLOR is set."""
    stream = sys.stdout if stream is None else stream
    if not is_terminal(stream) or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def is_terminal(stream: Stream) -> bool:
    """Whether a person watches this stream, on a terminal that understands cursor movement."""
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


ARGUMENT_FLAGS = {
    "budget_minutes": "--budget",
    "chat=False": "--no-chat",
    "contents": "--rank-contents",
    "contents_file": "--contents",
    "edges": "--knock",
    "heads": "--head",
    "only": "--ifeval-only",
    "sites": "--site",
    "source": "--from",
    "taken": "--iv-from",
    "url": "--judge",
    "ways": "--beside",
}
"""Library arguments whose flag has another name, and that flag."""


def one_line(message: object) -> str:
    """A message without line breaks, with flags where a library error names arguments."""
    return with_flags(" ".join(str(message).split()))


def with_flags(text: str) -> str:
    """`text` with every argument that is a flag here written as one: `` `d_sae` `` is --d-sae."""
    argument = r"`([a-z][a-z0-9_]*(?:=False)?)`"
    return re.sub(argument, lambda found: _flag_table().get(found[1], found[0]), text)


def use_flags(table: Callable[[], Mapping[str, str]]) -> None:
    """Give `with_flags` the flags by argument; `table` is called when a message names one."""
    global _flag_table
    _flag_table = table


_flag_table: Callable[[], Mapping[str, str]] = ARGUMENT_FLAGS.copy  # until `use_flags`


def print_error(message: object) -> None:
    """Print the message of a failed verb on stderr, as one line."""
    print(f"{paint('error:', 'red', sys.stderr)} {one_line(message)}", file=sys.stderr)


def print_json(document: object, *, one_a_line: bool = False) -> None:
    """Print a JSON document, on one line with `one_a_line`. NaN and infinity become null."""
    # Escapes keep the document valid where stdout cannot take every character.
    ascii_only = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    indent = None if one_a_line else 2
    print(json.dumps(files.plain(document), indent=indent, ensure_ascii=ascii_only))


def print_table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: str = "",
    *,
    indent: int = 0,
    stream: Stream | None = None,
) -> None:
    """Aligned columns on stdout: numbers to the right, the columns named in `left` to the left.

    On a terminal that is too narrow, the columns to the left are shortened, figures never; where
    that is not enough, each row becomes a block of lines. In a file or a pipe a line is as long as
    it has to be.
    """
    named = left.split(",")
    room = _columns(sys.stdout if stream is None else stream)
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    if room is not None:
        texts = [i for i, header in enumerate(headers) if header in named]
        widths = _narrowed(widths, texts, room - indent)
        if sum(widths) + 2 * (len(widths) - 1) > room - indent and len(headers) > 2:
            _print_blocks(headers, rows, indent, room, stream)
            return
    lines = []
    for row in [headers, *rows]:
        cells = [
            _cut(cell, width).ljust(width) if header in named else cell.rjust(width)
            for cell, width, header in zip(row, widths, headers, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    for line in [paint(lines[0], "bold"), *lines[1:]]:
        print(f"{' ' * indent}{line}", file=stream, flush=True)


_SHORTEST = 12
"""Characters that a shortened column keeps at least."""


def _columns(stream: Stream) -> int | None:
    """Columns of the terminal; None where the stream is none."""
    return shutil.get_terminal_size().columns if is_terminal(stream) else None


def _narrowed(widths: Sequence[int], texts: Sequence[int], room: int) -> list[int]:
    """Widths of columns that fit into `room`, if shortening the widest of `texts` can do it."""
    found = list(widths)
    over = sum(found) + 2 * (len(found) - 1) - room
    while over > 0:
        widest = max(texts, key=lambda i: found[i], default=None)
        if widest is None or found[widest] <= _SHORTEST:
            break
        found[widest] -= 1
        over -= 1
    return found


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _print_blocks(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    indent: int,
    room: int,
    stream: Stream | None,
) -> None:
    """Each row as lines of `header  value`, under its first cell."""
    width = max(len(header) for header in headers[1:])
    for row in rows:
        first = paint(f"{headers[0]} {row[0]}", "bold")
        print(f"{' ' * indent}{first}", file=stream, flush=True)
        for header, cell in zip(headers[1:], row[1:], strict=True):
            value = _cut(cell, max(_SHORTEST, room - indent - width - 4))
            print(f"{' ' * indent}  {header.ljust(width)}  {value}", file=stream, flush=True)


def program() -> str:
    """How to call this program in a shell: its name, or its path where PATH does not find it."""
    ran = sys.argv[0]
    found = shutil.which("saesteer")
    if os.path.basename(ran) != "saesteer" or (found and os.path.samefile(found, ran)):
        return "saesteer"
    return ran


def command_line() -> str:
    """The command that is running, for records."""
    return shlex.join(["saesteer", *sys.argv[1:]])


def print_next(*words: object) -> None:
    """Print the command to run next: a verb and its flags."""
    print(f"{paint('next:', 'cyan')} {shlex.join([program(), *map(str, words)])}")


def print_page(page: Path, *, show: bool) -> None:
    """Print where the page of the results is, and open it in a browser where that is wanted."""
    print(f"{paint('page:', 'cyan')} {page}")
    if show:
        import webbrowser

        if not webbrowser.open(page.resolve().as_uri()):
            print_error("--open found no browser: open the page yourself")


def amount(number: int | float) -> str:
    """A count with separators: 1234567 is 1,234,567."""
    return f"{number:,.0f}"


def size(count: int | float) -> str:
    """Bytes for people, in powers of 1000: 1234567 is 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: int | float) -> str:
    """Seconds for people: 4.2 s, 3 min 51 s, 1 h 02 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def number(value: int | float | None, digits: int = 4) -> str:
    """A measured value in a few significant digits; a dash for None and NaN."""
    if value is None or value != value:
        return "-"
    return f"{value:.{digits}g}"


def write_run(folder: Path, verb: str, arguments: Document, **facts: object) -> None:
    """Write `run.json`: the verb, its arguments, `facts`, and the versions of the software."""
    from saesteer.checkpoints.provenance import git_revision, versions

    document = {
        "schema_version": 1,
        "verb": verb,
        "arguments": {key: value for key, value in arguments.items() if value is not None},
        **facts,
        "versions": versions(),
        "git_revision": git_revision(),
    }
    files.write_json(folder / "run.json", document)


class Failed(UserError):
    """A verb finished and its results, already printed, show that a check failed."""
