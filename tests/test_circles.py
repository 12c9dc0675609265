"""No module imports another in a circle, imports inside functions included."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import networkx  # torch brings it
import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "checkpoints", "sae", "steering", "mechanisms", "cli")

ALLOWED: set[tuple[str, ...]] = set()
"""Circles that may stay. Only ever make this shorter."""


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of modules that reach each other by imports, each in alphabetical order."""
    whole = networkx.DiGraph(dict(graph))
    groups = networkx.strongly_connected_components(whole)
    return sorted(sorted(group) for group in groups if len(group) > 1)


def imported(tree: ast.Module, package: str, known: set[str]) -> Iterator[str]:
    """The modules among `known` that a module of `package` imports, wherever in its code."""
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            nodes += node.orelse
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            # `from package import module` imports the module, `from module import name` does not.
            names = [
                inner if (inner := f"{base}.{alias.name}") in known else base
                for alias in node.names
            ]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]  # lazy exports and import_module name modules that way
        else:
            continue
        yield from (name for name in names if name in known)


def import_graph(root: Path, rooms: tuple[str, ...] = ROOMS) -> dict[str, set[str]]:
    """Module -> the modules of the house that it imports."""
    sources = {}
    for room in rooms:
        for path in (root / room).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(("saesteer", *parts))
            sources[name.removesuffix(".__init__")] = (path, name.rpartition(".")[0])
    known = set(sources)
    return {
        name: set(imported(ast.parse(path.read_text(encoding="utf-8")), package, known)) - {name}
        for name, (path, package) in sources.items()
    }


def test_no_module_imports_another_in_a_circle() -> None:
    graph = import_graph(ROOT)
    assert len(graph) > 100 and graph["saesteer.checkpoints.hub"]
    found = {tuple(circle) for circle in circles(graph)}
    new = sorted(" <-> ".join(circle) for circle in found - ALLOWED)
    gone = sorted(" <-> ".join(circle) for circle in ALLOWED - found)
    assert not new, f"import circles: {new}"
    assert not gone, f"mended, so take them off the list: {gone}"


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ({"a": "import saesteer.sae.b", "b": ""}, []),
        ({"a": "import saesteer.sae.b", "b": "import saesteer.sae.a"}, [["a", "b"]]),
        ({"a": "def f():\n    from saesteer.sae import b", "b": "from .a import x"}, [["a", "b"]]),
        (
            {"a": "from .b import x", "b": "from . import c", "c": "from . import a"},
            [["a", "b", "c"]],
        ),
        ({"a": "from .b import x", "b": "f('saesteer.sae.a')"}, [["a", "b"]]),
        ({"a": "if TYPE_CHECKING:\n    from .b import x", "b": "from . import a"}, []),
        (
            {
                "a": "if TYPE_CHECKING:\n    pass\nelse:\n    from . import b",
                "b": "from . import a",
            },
            [["a", "b"]],
        ),
        ({"a": "from . import b", "b": "", "c": "from . import a", "d": "from . import c"}, []),
    ],
)
def test_the_test_finds_circles(
    tmp_path: Path, sources: dict[str, str], expected: list[list[str]]
) -> None:
    (tmp_path / "sae").mkdir()
    for name, source in {"__init__": "", **sources}.items():
        (tmp_path / "sae" / f"{name}.py").write_text(source, encoding="utf-8")
    found = circles(import_graph(tmp_path, ("sae",)))
    assert found == [[f"saesteer.sae.{name}" for name in circle] for circle in expected]
