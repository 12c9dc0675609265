"""The printout of a demo in README.md comes from a run: docs/put_demo.py puts it there."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRINTOUT = """
1. model  load tiny
   took 0.1 s

Side by side  (the first 3 test contents)

   The first content.
   unsteered [does not follow]
      An answer,
      in two lines.

   The second content.
   unsteered [strict]
      Another.

   The third content.
   unsteered [strict]
      A third.

Rates  (tiny; sampled)
   arm   strict
"""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("put_demo", ROOT / "docs" / "put_demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def record() -> dict[str, object]:
    return {
        "complete": True,
        "stages": {"model": {"name": "smollm2-135m-instruct-q4", "dtype": "bfloat16"}},
    }


def test_the_first_content_stays_and_the_others_are_counted(script: ModuleType) -> None:
    kept = script.trimmed(PRINTOUT)
    assert "The first content." in kept and "in two lines." in kept
    assert "The second content." not in kept and "A third." not in kept
    assert "(... 2 more contents ...)" in kept
    assert kept.endswith("Rates  (tiny; sampled)\n   arm   strict")


def test_each_task_keeps_its_first_content(script: ModuleType) -> None:
    """Where examples follow the line of their stage."""
    stage = "{0}. find {0}\n   A content.\n   steered [strict]\n      Oui.\n\n   Another.\n" + (
        "   steered [passes nothing]\n      Non.\n\n   on 2 test contents\n"
    )
    kept = script.trimmed(stage.format(4) + "\n" + stage.format(5))
    assert kept.count("A content.") == 2 and "Another." not in kept
    assert kept.count("(... 1 more content ...)") == kept.count("on 2 test contents") == 2


def test_the_section_is_replaced_and_nothing_else(
    script: ModuleType, record: dict[str, object], tmp_path: Path
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    (tmp_path / "demo.txt").write_text(PRINTOUT)
    (tmp_path / "demo.json").write_text(json.dumps(record))
    given = [tmp_path / "demo.txt", "--demo", tmp_path / "demo.json", "--readme", readme]
    for _ in range(2):  # a second time changes nothing
        script.main([str(word) for word in given])
        text = readme.read_text()
        assert text.startswith("before\n") and text.endswith(f"{script.END}\nafter\n")
        assert "\nold\n" not in text and " torch 2." in text and " thread" in text
        assert "de-quantised 4-bit weights" in text and text.count("Side by side") == 1


def test_a_demo_that_was_stopped_is_refused(script: ModuleType, record: dict[str, object]) -> None:
    with pytest.raises(SystemExit, match="did not run to its end"):
        script.section(PRINTOUT, {**record, "complete": False}, "make demo", "2026-11-27")


def test_the_readme_holds_the_marks_once(script: ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count(script.BEGIN) == text.count(script.END) == 1
