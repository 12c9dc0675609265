"""`saesteer diff`: two models and errors."""

from collections.abc import Callable
from pathlib import Path

from .conftest import Cli


def test_two_models_are_compared(
    cli: Cli, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    words = ("diff", "--base", tiny_model_dir("llama"), "--tuned", tiny_model_dir("llama", seed=1),
             "-q")  # fmt: skip
    (tmp_path / "words.txt").write_text("dog\ncat\nhouse\n")
    done = cli(*words, "--words", tmp_path / "words.txt", "--most", 10, "--k", 4, "--top", 5,
               "-o", tmp_path / "out")  # fmt: skip
    assert done.status == 0, done.err
    assert "noise: verbs" in done.out and "largest angle" in done.out
    found = cli(*words, "--what", "concepts", "--k", 4, "--json").json()
    assert len(found["concepts"]) == 4 and not found["heads"]


def test_errors(cli: Cli, tiny_model_dir: Callable[..., Path]) -> None:
    assert "--base is missing" in cli("diff", "-q").error(2)
    model = tiny_model_dir("llama")
    words = ("diff", "--base", model, "--tuned")
    assert "nothing to see" in cli(*words, model, "-q").error(1)
    assert "--what must be one of heads, concepts" in cli(*words, model, "--what", "x", "-q").error(
        2
    )
