"""The wheel holds only ``saesteer/``, all of it, and works where the repository is not."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("sae", "steering", "mechanisms", "kernels", "checkpoints", "cli")
SUFFIXES = (".py", ".typed", ".yaml", ".jsonl", ".html", ".css", ".js")

# Runs in a child with the installed wheel first on the path. The packages of this environment stay
# importable; only its editable install of saesteer, which points at the repository, is taken out.
IMPORT_EVERYTHING = """
import importlib, importlib.resources, json, runpy, sys

def editable(thing):
    return (getattr(thing, "__module__", "") or "").startswith("__editable___saesteer")

sys.meta_path = [finder for finder in sys.meta_path if not editable(finder)]
sys.path_hooks = [hook for hook in sys.path_hooks if not editable(getattr(hook, "__self__", hook))]
sys.path = [entry for entry in sys.path if "__editable__.saesteer" not in entry]
sys.path_importer_cache.clear()
sys.modules.pop("saesteer", None)

files = {}
for name in json.loads(sys.argv[1]):
    files[name] = importlib.import_module(name).__file__
data = importlib.resources.files("saesteer.steering.tasks") / "builtin"
builtin = sorted(entry.name for entry in data.iterdir())

import saesteer
wanted = ("load_sae", "train", "rank", "steer", "__version__")
offers = sorted(name for name in wanted if name in dir(saesteer) and hasattr(saesteer, name))

sys.argv = ["saesteer", "--help"]
try:
    runpy.run_module("saesteer", run_name="__main__")
    status = 0
except SystemExit as stop:
    status = stop.code or 0
print()
print(json.dumps({"files": files, "builtin": builtin, "help_status": status,
                  "offers": offers}))
"""


def run(command: list[str], **keywords: object) -> str:
    """Run a child; show what it said when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, **keywords)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


@pytest.fixture(scope="module")
def clean_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a commit would hold: no build leftovers, nothing that git ignores."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT)
    tree = tmp_path_factory.mktemp("tree")
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file():  # git lists a deleted file until the deletion is committed
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    return tree


@pytest.fixture(scope="module")
def wheel(clean_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # No isolation: the [dev] extra has setuptools, and the fast tests stay off the network.
    pip = [sys.executable, "-P", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    run([*pip, "wheel", *options, "--wheel-dir", str(folder), str(clean_tree)])
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture(scope="module")
def dist_info(names: set[str]) -> str:
    (folder,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
    return folder


def test_wheel_is_pure_python(wheel: Path) -> None:
    assert wheel.name.startswith("saesteer-")
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_holds_only_saesteer(names: set[str], dist_info: str) -> None:
    assert {name.split("/")[0] for name in names} == {"saesteer", dist_info}
    inside = {name.split("/")[1] for name in names if name.startswith("saesteer/")}
    assert inside == {*ROOMS, "__init__.py", "__main__.py"}
    assert "saesteer/kernels/__init__.py" not in names


def test_wheel_holds_all_of_saesteer(names: set[str], clean_tree: Path) -> None:
    expected = {
        # cli/toplevel is the package saesteer itself
        f"saesteer/{path.relative_to(clean_tree).as_posix()}".replace("/cli/toplevel/", "/")
        for room in ROOMS
        for path in (clean_tree / room).rglob("*")
        if path.suffix in SUFFIXES
    }
    assert {name for name in names if name.startswith("saesteer/")} == expected
    for room in ROOMS:
        assert f"saesteer/{room}/py.typed" in names
    builtin = [name for name in names if name.startswith("saesteer/steering/tasks/builtin/")]
    assert {".yaml", ".jsonl"} <= {Path(name).suffix for name in builtin}


def test_wheel_names_its_licence_and_command(wheel: Path, dist_info: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{dist_info}/METADATA").decode()
        licence = archive.read(f"{dist_info}/licenses/LICENSE").decode()
        commands = archive.read(f"{dist_info}/entry_points.txt").decode()
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "Requires-Python: >=3.11\n" in metadata
    assert "Requires-Dist: torch<2.14,>=2.8\n" in metadata
    assert "Apache License" in licence
    assert "saesteer = saesteer.cli.__main__:main" in commands


def test_installed_wheel_imports_everywhere(
    wheel: Path, names: set[str], clean_tree: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    pip = [sys.executable, "-P", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)])
    modules = sorted(
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in names
        if name.startswith("saesteer/") and name.endswith(".py")
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    said = run(
        [sys.executable, "-P", "-c", IMPORT_EVERYTHING, json.dumps(modules)],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    result = json.loads(said.splitlines()[-1])
    for name, file in result["files"].items():
        assert Path(file).is_relative_to(site), f"{name} came from {file}"
    assert set(result["files"]) == set(modules)
    assert result["offers"] == ["__version__", "load_sae", "rank", "steer", "train"]
    in_tree = {path.name for path in (clean_tree / "steering" / "tasks" / "builtin").iterdir()}
    assert {name for name in result["builtin"] if name != "__pycache__"} == in_tree
    assert result["help_status"] == 0
