"""What importing costs: every module without triton, nothing heavy where it has to be quick."""

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("sae", "steering", "mechanisms", "kernels", "checkpoints", "cli")
VERBS = ("demo", "harvest", "train", "metrics", "rank", "steer", "sweep", "find", "evaluate")
VERBS += ("convert", "doctor", "push", "reproduce", "tasks", "formats", "models", "watch")
VERBS += ("patch", "circuit", "toy", "trace", "probe", "attribute", "diff")
VERBS += ("latents", "serve")

HEAVY = {"torch", "transformers", "sae_lens", "datasets", "triton", "pandas", "scipy", "sklearn"}

PRINT_LOADED = "import json, sys; print(); print(json.dumps(sorted(sys.modules)))"


def module_names() -> list[str]:
    return sorted(
        "saesteer."
        + ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if path.parent.name != "toplevel"  # the package saesteer itself, imported with any other
    )


def child(code: str, *arguments: str, cwd: Path | None = None) -> str:
    """Run code in a fresh interpreter; return the last line it printed."""
    command = [sys.executable, "-P", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


def loaded_after(code: str) -> set[str]:
    """The top-level packages a fresh interpreter holds after running code."""
    modules = json.loads(child(f"{code}\n{PRINT_LOADED}"))
    return {name.split(".")[0] for name in modules}


def test_every_module_imports_without_triton_and_without_cuda() -> None:
    code = """
import importlib, json, sys
sys.modules["triton"] = None  # makes `import triton` raise ImportError
names = json.loads(sys.argv[1])
for name in names:
    importlib.import_module(name)
import torch
print(json.dumps([sum(name in sys.modules for name in names), torch.cuda.is_initialized()]))
"""
    names = module_names()
    assert json.loads(child(code, json.dumps(names))) == [len(names), False]


@pytest.mark.parametrize(
    "name",
    [
        "saesteer",
        "saesteer.sae",
        "saesteer.sae.config",
        "saesteer.steering",
        "saesteer.checkpoints",
        "saesteer.checkpoints.errors",
        "saesteer.cli",
        "saesteer.cli.__main__",
    ],
)
def test_light_modules_load_nothing_heavy(name: str) -> None:
    loaded = loaded_after(f"import {name}")
    assert "saesteer" in loaded
    assert loaded & HEAVY == set()


def test_the_package_offers_its_main_calls() -> None:
    """`dir(saesteer)` tells the truth: each name is there, and is the call of its room."""
    code = """
import json
import saesteer
from importlib.metadata import version
names = sorted(saesteer._ROOMS)
print(json.dumps([
    [name for name in names if name not in dir(saesteer)],
    [name for name in names if not callable(getattr(saesteer, name))],
    saesteer.__version__ == version("saesteer"),
    "saesteer." + saesteer.__doc__.split("saesteer.")[1].split("(")[0],
    [name for name in dir(saesteer) if not hasattr(saesteer, name)],
    sorted({name for name in dir(saesteer) if name[0] != "_"} - {*names}),
]))
"""
    rooms = ["checkpoints", "mechanisms", "sae", "steering"]
    assert json.loads(child(code)) == [[], [], True, "saesteer.load_model", [], rooms]


def test_the_ops_load_only_torch() -> None:
    loaded = loaded_after("import saesteer.kernels.ops")
    assert "torch" in loaded
    assert loaded & {"transformers", "sae_lens", "datasets"} == set()


def typed_exports(room: str) -> list[str]:
    """The names a room's __init__ imports for type checkers: what it promises to export."""
    tree = ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8"))
    blocks = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return [alias.asname or alias.name for node in imports for alias in node.names]


@pytest.mark.parametrize("room", ["sae", "steering", "mechanisms", "checkpoints"])
def test_rooms_export_what_they_promise(room: str) -> None:
    """What a type checker sees can be had when running, without sae_lens or datasets."""
    names = typed_exports(room)
    assert names
    code = f"""
import json, sys
import saesteer.{room} as room
missing = [name for name in json.loads(sys.argv[1]) if not hasattr(room, name)]
print(json.dumps([missing, [m for m in ("sae_lens", "datasets") if m in sys.modules]]))
"""
    assert json.loads(child(code, json.dumps(names))) == [[], []]


def test_help_of_every_verb_loads_nothing_heavy() -> None:
    code = f"""
import contextlib, io, json, sys
from saesteer.cli.__main__ import main
texts = {{}}
for verb in (None, *{VERBS!r}):
    sys.argv = ["saesteer", *([verb] if verb else []), "--help"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            status = main()
        except SystemExit as stop:
            status = stop.code
    assert not status, (verb, status)
    texts[str(verb)] = out.getvalue()
print(json.dumps([sorted({{name.split(".")[0] for name in sys.modules}}), texts]))
"""
    loaded, texts = json.loads(child(code))
    assert set(loaded) & HEAVY == set()
    for verb in VERBS:
        assert verb in texts["None"]
        assert "--" in texts[verb]


@pytest.mark.slow
def test_help_answers_in_half_a_second() -> None:
    """The fast suite checks what decides it: that help imports nothing heavy."""

    def once() -> float:
        start = time.perf_counter()
        command = [sys.executable, "-P", "-m", "saesteer.cli", "--help"]
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - start

    # The best of a few: a busy machine makes single runs slow, a heavy import makes all of them.
    assert min(once() for _ in range(5)) < 0.5


def test_the_folder_kernels_does_not_pass_for_hugging_faces_kernels() -> None:
    """With the repository as working directory, as in `python -m pytest` run there."""
    code = f"""
import importlib.util, sys
sys.path.insert(0, {str(ROOT)!r})
from importlib.metadata import PackageNotFoundError, version
try:
    version("kernels")
    installed = True
except PackageNotFoundError:
    installed = False
from transformers.utils import is_kernels_available
print(is_kernels_available() == installed)
"""
    assert child(code, cwd=ROOT) == "True"
