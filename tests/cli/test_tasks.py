"""`saesteer tasks` tells what `--task` takes."""

from saesteer.steering import builtin_tasks, load_task

from .conftest import Cli


def test_lists_every_built_in_task(cli: Cli) -> None:
    found = cli("tasks", "--json").json()
    assert [row["name"] for row in found] == builtin_tasks()
    french = next(row for row in found if row["name"] == "french")
    task = load_task("french")
    assert french["instruction"] == task.instruction
    assert french["contents"]["test"] == len(task.contents["test"])
    assert french["wordings"] == len(task.wordings)


def test_the_table_has_a_line_a_task(cli: Cli) -> None:
    outcome = cli("tasks")
    assert (outcome.status, outcome.err) == (0, "")
    first = [line.split()[0] for line in outcome.out.splitlines()]
    assert first == ["task", *builtin_tasks()]
