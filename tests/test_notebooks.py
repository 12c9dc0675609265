"""The notebooks: they hold the cells of their script with the outputs of a run, and still run."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "notebooks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_notebooks", FOLDER / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells_of(name: str) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    return cells


def test_every_notebook_is_of_the_script(script: ModuleType) -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(script.NOTEBOOKS)


@pytest.mark.parametrize("name", ["road", "published_sae"])
def test_a_notebook_holds_the_cells_of_the_script_and_small_outputs(
    script: ModuleType, name: str
) -> None:
    cells = cells_of(name)
    assert ["".join(cell["source"]) for cell in cells] == script.NOTEBOOKS[name]
    for cell in cells:
        code = script.is_code("".join(cell["source"]))
        assert cell["cell_type"] == ("code" if code else "markdown")
        if code:
            assert cell["execution_count"] is not None
            assert all(one["output_type"] != "error" for one in cell["outputs"])
            assert all(one.get("name") != "stderr" for one in cell["outputs"])
    assert any(cell.get("outputs") for cell in cells)
    text = (FOLDER / f"{name}.ipynb").read_text()
    assert len(text.encode()) <= script.LARGEST
    assert "/tmp/" not in text and "/home/" not in text, "outputs name no machine"


def test_what_is_text_and_what_is_code(script: ModuleType) -> None:
    assert script.is_code("import saesteer") and script.is_code("trained.plot()")
    assert not script.is_code("## Steering") and not script.is_code("Some words, and more of them.")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["road", "published_sae"])
def test_every_cell_runs(
    script: ModuleType, name: str, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    cells = script.smaller(script.NOTEBOOKS[name], str(tiny_model_dir("llama")))
    assert cells != script.NOTEBOOKS[name]
    made = script.run(cells, tmp_path)
    assert sum(bool(cell.get("outputs")) for cell in made.cells) >= 5
