"""The documentation site: every page is in its navigation, and what is generated is whole."""

import argparse
import importlib.util
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from saesteer.cli.__main__ import VERBS, make_parser

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_site", ROOT / "docs" / "build_site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def staged(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place: Path = tmp_path_factory.mktemp("site")
    script.stage(place)
    return place


def pages_in(nav: list[Any]) -> Iterator[str]:
    for entry in nav:
        for value in entry.values():
            if isinstance(value, str):
                yield value
            else:
                yield from pages_in(value)


def test_every_page_is_in_the_navigation_once(staged: Path) -> None:
    config = tomllib.loads((staged / "zensical.toml").read_text())
    named = list(pages_in(config["project"]["nav"]))
    assert len(named) == len(set(named))
    pages = {path.relative_to(staged / "pages").as_posix() for path in staged.rglob("*.md")}
    listings = {page for page in pages if page.startswith("files/")}
    assert pages - listings == set(named), "docs/zensical.toml names every page, under its heading"


def test_links_within_the_site_lead_to_staged_files(script: ModuleType, staged: Path) -> None:
    for page in staged.rglob("*.md"):
        text = script._CODE.sub("", page.read_text(encoding="utf-8"))
        for found in script.LINK.finditer(text):
            if found[1]:
                assert (page.parent / found[1]).exists(), f"{page.name}: {found[0]}"


def test_a_link_that_leads_nowhere_stops_the_build(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        (tmp_path / name).write_text("# Page\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "one.md").write_text("[`gone`](gone.md), `[not](a-link.md)`\n")
    monkeypatch.setattr(script, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="docs/one.md links to gone.md"):
        script.stage(tmp_path / "out")


def test_the_reference_of_commands_has_every_flag(staged: Path) -> None:
    text = (staged / "pages" / "reference" / "commands.md").read_text()
    for verb in VERBS:
        section = text.split(f"\n## {verb}\n")[1].split("\n## ")[0]
        for option, action in make_parser(verb).flags().items():
            listed = action.help != argparse.SUPPRESS and option not in ("-h", "--help")
            assert (f"`{option}`" in section) == listed, f"{verb} {option}"


def test_the_reference_of_calls_has_every_public_name(script: ModuleType, staged: Path) -> None:
    for room in script.ROOMS:
        text = (staged / "pages" / "api" / f"{room}.md").read_text()
        names = script.public_names(room)
        assert names
        for name, module in names.items():
            assert f"::: {module}.{name}\n" in text
            assert hasattr(sys.modules[module], name)


def test_broken_links_of_built_pages_are_found(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<h2 id="here">A</h2><a href="b.html">fine</a><a href="#here">fine</a>'
        '<a href="https://example.org/x">elsewhere</a><a href="b.html#gone">no</a>'
        '<img src="no.png">'
    )
    (tmp_path / "b.html").write_text('<p id="there">B</p>')
    assert script.broken_links(tmp_path) == ["a.html: b.html#gone", "a.html: no.png"]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(script: ModuleType, tmp_path: Path) -> None:
    if not Path(sys.executable).with_name("zensical").exists():
        pytest.skip("zensical is not installed: make docs installs it")
    site = script.build(tmp_path / "work")
    pages = {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    assert {"index.html", "reference/commands.html", "api/sae.html"} <= pages
    assert "HarvestConfig" in (site / "api" / "sae.html").read_text()
    # Nothing is fetched when a page is opened.
    text = (site / "index.html").read_text()
    assert 'src="http' not in text and "fonts.googleapis" not in text
    shutil.rmtree(tmp_path / "work")
