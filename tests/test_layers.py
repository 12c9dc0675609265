"""The house: arrows between the rooms point one way, and everything lies where it is looked for."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "kernels": set(),
    "checkpoints": set(),
    "sae": {"kernels", "checkpoints"},
    "steering": {"sae", "kernels", "checkpoints"},
    "mechanisms": {"steering", "sae", "kernels", "checkpoints"},
    "cli": {"mechanisms", "steering", "sae", "kernels", "checkpoints"},
}
"""Room -> the other rooms it may import. Nothing may import cli."""

KERNELS_MAY_IMPORT = {"torch", "triton", "jaxtyping", "numba", "numpy"}
"""Besides the standard library: the ops stay usable without the rest of the house."""

MOST_MODULES = 16
"""In one folder; more are put into sub-folders named for what they hold."""

FLAT_ROOMS = {"kernels", "checkpoints", "cli"}
"""One file per op, per kind of file and per verb: a list to look things up in, however long."""

HEAVY = {"torch", "transformers", "sae_lens", "datasets", "triton", "accelerate", "pandas"}
HEAVY |= {"scipy", "sklearn", "captum"}
"""Not imported at the top of a module that has to load in a moment."""

SAESTEER_NAME = re.compile(r"saesteer(\.[A-Za-z_]\w*)+")


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of everything a module imports, wherever in the module.

    A relative import starts with its dots. A string that is exactly a dotted name under saesteer
    counts as well: lazy exports and importlib.import_module name modules that way.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield node.lineno, base
            for alias in node.names:  # from saesteer import sae
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if SAESTEER_NAME.fullmatch(node.value):
                yield node.lineno, node.value


def top_level_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of what runs on import: not in functions or TYPE_CHECKING."""

    def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                yield from statements(node.orelse)
                continue
            yield node
            for inner in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, inner, []))
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body)

    for node in statements(tree.body):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module


def problems(room: str, source: str, *, light: bool = False) -> list[str]:
    """Say what is wrong with the imports of one module of a room."""
    found = []
    tree = ast.parse(source)
    for line, name in imports(tree):
        head, *rest = name.split(".")
        if name.startswith(".."):
            found.append(f"{line}: '{name}' leaves the room: write saesteer.<room>")
        elif head in MAY_IMPORT:
            found.append(f"{line}: '{name}' is not a package: write saesteer.{head}")
        elif head == "saesteer" and rest and rest[0] in MAY_IMPORT:
            if rest[0] != room and rest[0] not in MAY_IMPORT[room]:
                found.append(f"{line}: {room} may not import {rest[0]}")
        elif room == "kernels" and head and head not in sys.stdlib_module_names:
            if head != "saesteer" and head not in KERNELS_MAY_IMPORT:
                found.append(f"{line}: kernels may not import {head}")
    if light:
        for line, name in top_level_imports(tree):
            if name.split(".")[0] in HEAVY:
                found.append(f"{line}: '{name}' is heavy: import it in the function that needs it")
    return sorted(set(found))


def modules() -> list[Path]:
    return sorted(path for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))


def is_light(path: Path) -> bool:
    relative = path.relative_to(ROOT)
    return (
        relative.parts[0] == "cli"  # with cli/toplevel, the package saesteer itself
        or path.name == "__init__.py"
        or relative in (Path("sae/config.py"), Path("mechanisms/config.py"))
    )


def module_folders() -> list[Path]:
    """Every folder of a room that holds modules, relative to the repository."""
    return sorted({path.parent.relative_to(ROOT) for path in modules()})


def is_regular(folder: Path) -> bool:
    """Whether a folder is a package with an `__init__.py`: all but kernels/ itself."""
    return folder != Path("kernels")


def folder_problems(folder: Path, names: Iterable[str], docstring: str | None) -> list[str]:
    """Say what is wrong with a folder of modules called `names`, `__init__.py` among them."""
    found = []
    count = sum(name != "__init__.py" for name in names)
    if is_regular(folder) and "__init__.py" not in names:
        found.append(f"{folder}/ has no __init__.py")
    elif is_regular(folder) and not docstring:
        found.append(f"{folder}/__init__.py has no docstring that says what the folder holds")
    if count > MOST_MODULES and str(folder) not in FLAT_ROOMS:
        found.append(f"{folder}/ holds {count} modules, at most {MOST_MODULES}: make sub-folders")
    return found


def misplaced(test: Path, code: Iterable[Path]) -> str | None:
    """Say where a test, relative to tests/, should lie, given the modules relative to the root.

    It lies in the folder of the module whose name it has. A test with a name of its own, after its
    subject, lies in any folder of the code, or at the top.
    """
    if not (test.parent == Path() or any(path.is_relative_to(test.parent) for path in code)):
        return f"tests/{test}: there is no folder {test.parent}/ in the code"
    name = test.name.removeprefix("test_")
    in_room = [path for path in code if test.parent == Path() or path.parts[0] == test.parts[0]]
    places = sorted(str(path.parent) for path in in_room if path.name == name)
    if places and str(test.parent) not in places:
        return f"tests/{test} is named like {places[0]}/{name}: move it to tests/{places[0]}/"
    return None


def nothing_wrong(found: Iterable[str]) -> None:
    """Fail with what is wrong, in one line."""
    if said := "; ".join(found):
        pytest.fail(said, pytrace=False)


def test_every_room_has_modules() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in modules()} == set(MAY_IMPORT)
    assert ROOT / "sae" / "config.py" in modules()  # its place is written down above


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    found = problems(room, path.read_text(encoding="utf-8"), light=is_light(path))
    nothing_wrong(f"{path.relative_to(ROOT)}:{problem}" for problem in found)


def test_kernels_is_no_regular_package() -> None:
    # A regular package called `kernels` in the working directory would be found in place of
    # Hugging Face's `kernels`, which transformers probes for.
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("folder", module_folders(), ids=str)
def test_a_folder_says_what_it_holds_and_is_not_too_full(folder: Path) -> None:
    names = {path.name for path in (ROOT / folder).glob("*.py")}
    init = ROOT / folder / "__init__.py"
    docstring = ast.get_docstring(ast.parse(init.read_text())) if init.is_file() else None
    nothing_wrong(folder_problems(folder, names, docstring))


def test_every_folder_is_packaged() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    expected = {f"saesteer.{'.'.join(folder.parts)}": str(folder) for folder in module_folders()}
    expected["saesteer"] = expected.pop("saesteer.cli.toplevel")  # the package itself
    for listing, key in ((set(settings["packages"]), "packages"),
                         (set(settings["package-dir"]), "package-dir")):  # fmt: skip
        missing = sorted(set(expected) - listing)
        nothing_wrong(f"pyproject.toml: {name} is missing from {key}" for name in missing)
    assert expected.items() <= settings["package-dir"].items()


def test_tests_mirror_the_code() -> None:
    code = [path.relative_to(ROOT) for path in modules()]
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    found = (misplaced(path.relative_to(ROOT / "tests"), code) for path in tests)
    nothing_wrong(problem for problem in found if problem)


def test_top_level_holds_only_what_the_layout_names() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    allowed = {
        *MAY_IMPORT,
        *("tests", "benchmarks", "docs", "examples"),
        *("pyproject.toml", "README.md", "Makefile"),
        *("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"),
        *("CITATION.cff", "Dockerfile"),
    }
    tracked = {name.split("/")[0] for name in listing.stdout.split("\0") if name}
    assert {name for name in tracked if not name.startswith(".")} <= allowed


@pytest.mark.parametrize(
    ("room", "source", "says"),
    [
        ("kernels", "import saesteer.checkpoints.errors", "1: kernels may not import checkpoints"),
        ("checkpoints", "from saesteer import kernels", "1: checkpoints may not import kernels"),
        (
            "sae",
            "def f():\n    from saesteer.steering import steer",
            "2: sae may not import",
        ),
        ("steering", "import saesteer.cli", "1: steering may not import cli"),
        ("steering", "NAMES = {'x': 'saesteer.cli.demo'}", "1: steering may not import cli"),
        ("sae", "from ..kernels import ops", "leaves the room"),
        ("sae", "import kernels.ops", "write saesteer.kernels"),
        ("sae", "from checkpoints.files import write_json", "write saesteer.checkpoints"),
        ("kernels", "import yaml", "1: kernels may not import yaml"),
        ("cli", "try:\n    import torch\nexcept ImportError:\n    pass", "2: 'torch' is heavy"),
        ("cli", "class C:\n    from transformers import AutoConfig", "2: 'transformers' is heavy"),
    ],
)
def test_the_check_sees_what_is_wrong(room: str, source: str, says: str) -> None:
    found = problems(room, source, light=True)
    assert len(found) >= 1
    assert all(says in line for line in found)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("kernels", "import math\nimport torch\nfrom saesteer.kernels.ops import encode_topk"),
        ("sae", "from saesteer.kernels.ops import encode_topk\nfrom .text import read"),
        ("cli", "def run():\n    import torch\n    from saesteer.steering import rank"),
        ("cli", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
    ],
)
def test_the_check_lets_the_rest_through(room: str, source: str) -> None:
    assert problems(room, source, light=room == "cli") == []


@pytest.mark.parametrize(
    ("folder", "names", "docstring", "says"),
    [
        ("sae/new", ["a.py"], None, "sae/new/ has no __init__.py"),
        ("sae/new", ["__init__.py", "a.py"], None, "has no docstring"),
        (
            "sae/new",
            ["__init__.py", *"abcdefghijklmnopq"],
            "Words.",
            "holds 17 modules, at most 16",
        ),
    ],
)
def test_the_check_sees_a_folder_that_is_wrong(
    folder: str, names: list[str], docstring: str | None, says: str
) -> None:
    (found,) = folder_problems(Path(folder), names, docstring)
    assert says in found
    assert folder_problems(Path("kernels"), "abcdefghijklmnopqrs", None) == []


def test_the_check_sees_a_test_that_lies_elsewhere() -> None:
    code = [Path("sae/runs/disk_use.py"), Path("sae/text/corpora.py")]
    for good in ("sae/runs/test_disk_use.py", "sae/runs/test_kills.py", "test_road.py"):
        assert misplaced(Path(good), code) is None
    for bad in ("sae/text/test_disk_use.py", "sae/test_disk_use.py", "test_disk_use.py"):
        expected = f"tests/{bad} is named like sae/runs/disk_use.py: move it to tests/sae/runs/"
        assert misplaced(Path(bad), code) == expected
    assert "no folder sae/gone/" in str(misplaced(Path("sae/gone/test_a.py"), code))
