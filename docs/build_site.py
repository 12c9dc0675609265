"""Build the documentation site from README.md, docs/ and the code: `make docs`.

    python docs/build_site.py                  # into build/docs/site/index.html

The pages are those of the repository. README.md is the first page; links out of docs/ lead to
copies of the files. The reference of commands is made from the flags of every verb, and the pages
of the Python calls from their docstrings. A link or an anchor that leads nowhere stops the build.
"""

import argparse
import html.parser
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
AS_PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
}
"""Files outside docs/ that are pages of the site, and their names there."""
ROOMS = {
    "sae": "From text to a trained SAE.",
    "steering": "From a trained SAE to a steered generation.",
    "checkpoints": "SAEs in every format, and what else touches a disk or the Hub.",
    "mechanisms": "How a behaviour is carried.",
}
"""The rooms with public calls, in a sentence each."""
LINK = re.compile(r"(?<=\]\()([^)\s#:]*)(#[^)\s]*)?(?=\))")
_CODE = re.compile(r"^```.*?^```|`[^`\n]+`", flags=re.S | re.M)


def stage(place: Path) -> None:
    """Write everything that the site is built from into a folder, made if missing.

    Raises FileNotFoundError for a link to a file that does not exist.
    """
    pages = place / "pages"
    sources = {ROOT / name: pages / page for name, page in AS_PAGES.items()}
    sources |= {
        source: pages / source.relative_to(ROOT / "docs")
        for source in sorted((ROOT / "docs").rglob("*.md"))
    }
    for source, page in sources.items():
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(_relinked(source, page, sources, pages), encoding="utf-8")
    _write(pages / "reference" / "commands.md", commands_page())
    for room in ROOMS:
        _write(pages / "api" / f"{room}.md", api_page(room))
    shutil.copy2(ROOT / "docs" / "zensical.toml", place / "zensical.toml")
    link_packages(place / "packages" / "saesteer")


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _relinked(source: Path, page: Path, sources: dict[Path, Path], pages: Path) -> str:
    """The text of a page with links as they are in the site."""

    def there(found: re.Match[str]) -> str:
        target, anchor = found[1], found[2] or ""
        if not target:
            return found[0]
        file = (source.parent / target).resolve()
        if not file.exists():
            raise FileNotFoundError(f"{source.relative_to(ROOT)} links to {target}")
        goal = sources.get(file) or _copied(file, pages)
        return os.path.relpath(goal, page.parent) + anchor

    text, end, parts = source.read_text(encoding="utf-8"), 0, []
    for code in _CODE.finditer(text):  # brackets in code are no links
        parts += [LINK.sub(there, text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, LINK.sub(there, text[end:])])


def _copied(file: Path, pages: Path) -> Path:
    """Where a file or folder of the repository is in the site; copies it there."""
    name = file.relative_to(ROOT)
    if file.is_dir():
        listing = pages / "files" / name / "index.md"
        files = sorted(one for one in file.iterdir() if one.is_file())
        lines = [f"# {name}/", "", *(f"- [{one.name}]({one.name})" for one in files), ""]
        _write(listing, "\n".join(lines))
        for one in files:
            shutil.copy2(one, listing.parent / one.name)
        return listing
    inside = name.relative_to("docs") if name.parts[0] == "docs" else Path("files") / name
    # A Markdown file that is no page (a table of results) is shown as the text it is.
    copy = pages / (inside.with_suffix(".txt") if file.suffix == ".md" else inside)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(file, copy)
    return copy


def link_packages(place: Path) -> None:
    """The tree of links that shows the rooms under their import names, for reading docstrings."""
    place.mkdir(parents=True)
    for room in ("sae", "steering", "mechanisms", "kernels", "checkpoints", "cli"):
        (place / room).symlink_to(ROOT / room)
    (place / "__init__.py").symlink_to(ROOT / "cli" / "toplevel" / "__init__.py")


# --- generated pages -----------------------------------------------------------------------------


def commands_page() -> str:
    """Every verb with its flags, as their help says."""
    from saesteer.cli.__main__ import VERBS, make_parser

    lines = ["# Commands", "", "Made from `saesteer VERB --help`.", ""]
    lines += ["| verb | |", "| --- | --- |"]
    lines += [f"| [`{verb}`](#{verb}) | {_cell(summary)} |" for verb, summary in VERBS.items()]
    for verb, summary in VERBS.items():
        parser = make_parser(verb)
        lines += ["", f"## {verb}", "", f"{summary[0].upper()}{summary[1:]}.", ""]
        lines += ["```text", parser.format_usage().strip(), "```", ""]
        lines += ["```sh", import_module(f"saesteer.cli.{verb}").EXAMPLE, "```", ""]
        for group in parser._action_groups:
            shown = [one for one in group._group_actions if one.help != argparse.SUPPRESS]
            shown = [one for one in shown if one.dest != "help"]
            if not shown:
                continue
            title = "arguments" if group.title == "positional arguments" else group.title
            lines += [f"**{title}**", "", "| flag | |", "| --- | --- |"]
            lines += [f"| {_flag(one)} | {_cell(_help(parser, one))} |" for one in shown]
            lines.append("")
    return "\n".join(lines) + "\n"


def _flag(action: argparse.Action) -> str:
    names = ", ".join(f"`{option}`" for option in action.option_strings)
    value = "" if action.nargs == 0 else f"`{action.metavar}`"
    return _cell(f"{names} {value}".strip())


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return (action.help or "") % {"prog": parser.prog, "default": action.default}


def _cell(text: str) -> str:
    """Text in a cell of a table: nothing in it is markup but code spans."""
    return re.sub(r"([|<>*_\[\]])(?=[^`]*(?:`[^`]*`[^`]*)*$)", r"\\\1", " ".join(text.split()))


def public_names(room: str) -> dict[str, str]:
    """The public calls of a room and the module that each is defined in."""
    package = import_module(f"saesteer.{room}")
    table = getattr(package, "_HOME", None) or getattr(package, "_MODULES", None)
    names = sorted(table if table is not None else package.__all__)
    return {name: getattr(package, name).__module__ for name in names}


def api_page(room: str) -> str:
    """The public calls of a room, each from its docstring."""
    lines = [f"# saesteer.{room}", "", ROOMS[room], ""]
    for name, module in public_names(room).items():
        lines += [f"::: {module}.{name}", ""]
    return "\n".join(lines)


# --- the built pages -----------------------------------------------------------------------------


class _Anchors(html.parser.HTMLParser):
    """The links and the anchors of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id"):
            self.ids.add(str(given["id"]))
        target = given.get("href" if tag in ("a", "link") else "src")
        if target is not None:
            self.links.append(target)


def broken_links(site: Path) -> list[str]:
    """Links within the built site that lead nowhere, as `page: link`."""
    read: dict[Path, _Anchors] = {}
    for page in sorted(site.rglob("*.html")):
        read[page] = _Anchors()
        read[page].feed(page.read_text(encoding="utf-8"))
    broken = []
    for page, found in read.items():
        if page.name == "404.html":  # its links begin at the root of a server
            continue
        for link in found.links:
            parts = urllib.parse.urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (
                (page.parent / urllib.parse.unquote(parts.path)).resolve() if parts.path else page
            )
            if target.is_dir():
                target = target / "index.html"
            there = read.get(target)
            anchor = urllib.parse.unquote(parts.fragment)
            if not target.exists() or (anchor and there is not None and anchor not in there.ids):
                broken.append(f"{page.relative_to(site)}: {link}")
    return broken


def build(place: Path) -> Path:
    """Stage and build in an empty folder, every warning an error; returns the site's folder."""
    stage(place)
    program = Path(sys.executable).with_name("zensical")
    if not program.exists():
        raise SystemExit("zensical is not installed: pip install 'saesteer[docs]'")
    ended = subprocess.run([program, "build", "--strict", "--clean"], cwd=place, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    if ended.returncode:
        raise SystemExit(ended.stdout)
    if broken := broken_links(place / "site"):
        raise SystemExit("links that lead nowhere:\n" + "\n".join(broken))
    return place / "site"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build" / "docs", help="folder to work in"
    )
    args: Any = parser.parse_args(argv)
    place = args.out.absolute()
    if place.exists():
        if not (place / "zensical.toml").exists() and any(place.iterdir()):
            raise SystemExit(
                f"{place} is not empty, and no site was built there: give another --out"
            )
        shutil.rmtree(place)
    site = build(place)
    print(f"{len(list(site.rglob('*.html')))} pages; open {site / 'index.html'}")


if __name__ == "__main__":
    main()
