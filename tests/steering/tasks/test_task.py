"""Task files: what is read, what is refused and how it is said, and what never leaks."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.steering.checks.catalogue import Verdict
from saesteer.steering.tasks import contents as contents_module
from saesteer.steering.tasks.task import (
    Variant,
    builtin_tasks,
    compose,
    load_task,
    reply_prompts,
    task_from_instruction,
)

GOOD: dict[str, Any] = {
    "name": "shout",
    "instruction": "Write it in capitals.",
    "variants": [
        {"text": "Schreibe es groß.", "lang": "de"},
        {"text": "Use capitals.", "lang": "en"},
        {"text": "All caps, please.", "lang": "en", "use": "evaluate"},
    ],
    "check": {"name": "uppercase"},
    "contents": [
        {"text": "The cat sleeps.", "split": "train"},
        {"text": "The dog barks.", "split": "train"},
        {"text": "The owl hoots.", "split": "dev"},
        {"text": "The cow moos.", "split": "test"},
    ],
}


def _write(folder: Path, **changes: Any) -> Path:
    document = {key: value for key, value in (GOOD | changes).items() if value != "absent"}
    path = folder / "shout.yaml"
    path.write_text(yaml.safe_dump(document, allow_unicode=True), encoding="utf-8")
    return path


def _message(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_task_file_is_read(tmp_path: Path) -> None:
    task = load_task(_write(tmp_path))
    assert task.name == "shout"
    assert task.contents == {
        "train": ("The cat sleeps.", "The dog barks."),
        "dev": ("The owl hoots.",),
        "test": ("The cow moos.",),
    }
    assert task.select_variants == (
        Variant("Write it in capitals."),
        Variant("Use capitals."),
        Variant("Schreibe es groß.", "de"),
    )
    assert task.evaluate_variants == (Variant("All caps, please.", "en", "evaluate"),)
    assert task.verdict("THE COW MOOS.", "The cow moos.") is Verdict.PASS
    assert task.verdict("The cow moos.", "The cow moos.") is Verdict.FAIL
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.name = "other"  # type: ignore[misc]


def test_contents_path_is_relative_to_the_task_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "deep"
    folder.mkdir()
    rows = "".join(json.dumps(row) + "\n" for row in GOOD["contents"])
    (folder / "mine.jsonl").write_text(rows, encoding="utf-8")
    path = _write(folder, contents="mine.jsonl")
    monkeypatch.chdir(tmp_path)
    assert load_task(path).contents == load_task(_write(tmp_path)).contents


def test_default_contents_are_the_built_in_ones(tmp_path: Path) -> None:
    task = load_task(_write(tmp_path, contents="absent"))
    assert task.contents == load_task("uppercase").contents


def test_split_picks_splits(tmp_path: Path) -> None:
    assert list(load_task(_write(tmp_path, split=["test", "train"])).contents) == ["train", "test"]


def test_contents_per_item_joins_neighbours(tmp_path: Path) -> None:
    task = load_task(_write(tmp_path, contents_per_item=2, split=["train"]))
    assert task.contents == {"train": ("The cat sleeps. The dog barks.",)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"instruction": "absent"}, "key 'instruction' is missing"),
        ({"check": "absent"}, "key 'check' is missing"),
        ({"instruction": "  "}, "key 'instruction' must be a non-empty text"),
        ({"name": "plain"}, "reserved"),
        ({"name": 3}, "key 'name' must be a text, got 3"),
        ({"variants": "Use capitals."}, "key 'variants' must be a list"),
        ({"variants": [{"lang": "en"}]}, "key 'variants[1].text' is missing"),
        ({"variants": [{"text": "x", "language": "en"}]}, "'variants[1].language'"),
        ({"variants": [{"text": "x", "use": "test"}]}, "'variants[1].use' must be select or"),
        ({"variants": [{"text": "write it in CAPITALS"}]}, "repeats an earlier wording"),
        ({"check": {"name": "shouting"}}, "key 'check.name' is 'shouting'"),
        ({"check": {"name": "keyword"}}, "key 'check.arguments' does not fit 'keyword'"),
        ({"check": {"name": "uppercase", "arguments": {"a": 1}}}, "key 'check.arguments'"),
        ({"check": {"name": "language", "arguments": {"lang": "xx"}}}, "unknown language 'xx'"),
        ({"check": {"name": "bullets", "arguments": {"minimum": 0}}}, "minimum must be"),
        ({"max_new_tokens": True}, "key 'max_new_tokens' must be a whole number, got True"),
        ({"split": []}, "key 'split' must name some of train, dev, test, got none"),
        ({"check": {"arguments": {}}}, "key 'check.name' is missing"),
        ({"max_new_tokens": 0}, "key 'max_new_tokens' must be at least 1, got 0"),
        ({"contents_per_item": 2}, "key 'contents_per_item' is 2, but split 'dev' has 1"),
        ({"split": ["train", "final"]}, "key 'split[2]' must be train, dev or test, got 'final'"),
        ({"contents": "none.jsonl"}, "no such file"),
        ({"contents": [{"text": "A.", "split": "final"}]}, "split 'final' is not one of"),
        ({"contents": [{"sentence": "A."}]}, "the field 'text' is missing"),
        ({"contents": [*GOOD["contents"], "A new one."]}, "1 of 5 rows have no split"),
        ({"contents": [{"text": "A.", "split": "train"}]}, "no contents in split 'dev'"),
        ({"contents": ["A.", "B."]}, "at least 3 are needed"),
        (
            {"contents": [*GOOD["contents"], {"text": "the cat  sleeps", "split": "test"}]},
            "occurs twice in splits train and test",
        ),
        (
            {"contents": [*GOOD["contents"], {"text": "The cat sleeps.", "split": "train"}]},
            "occurs twice: 'The cat sleeps.'",
        ),
    ],
)
def test_faults_are_named_with_file_and_key(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    path = _write(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        load_task(path)
    message = _message(error)
    assert said in message
    assert str(path) in message or "none.jsonl" in message


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (b"name: [", "not valid YAML"),
        (b"- a\n- b\n", "the content must be a mapping with name, instruction"),
        (b"name: \xff\xfe", "is not UTF-8"),
        (b"name: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_files_that_are_no_task(tmp_path: Path, written: bytes, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(written)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        load_task(path)
    assert str(path) in _message(error)


def test_an_unknown_name_lists_the_built_in_ones() -> None:
    with pytest.raises(UsageError) as error:
        load_task("frensh")
    message = _message(error)
    assert "'frensh'" in message and "`task`" in message
    assert all(name in message for name in builtin_tasks())


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`task`: no such file"):
        load_task(tmp_path / "nothing.yaml")


def test_the_hash_covers_every_field(tmp_path: Path) -> None:
    task = load_task(_write(tmp_path))
    assert task.hash == load_task(_write(tmp_path)).hash
    assert re.fullmatch(r"[0-9a-f]{64}", task.hash)
    changed = [
        dataclasses.replace(task, name="b"),
        dataclasses.replace(task, instruction="b"),
        dataclasses.replace(task, variants=task.variants[:-1]),
        dataclasses.replace(task, contents=task.contents | {"dev": ("b",)}),
        dataclasses.replace(task, check_name="lowercase"),
        dataclasses.replace(task, check_arguments={"a": 1}),
        dataclasses.replace(task, max_new_tokens=7),
    ]
    assert len(changed) == len(dataclasses.fields(task))
    assert len({task.hash, *(other.hash for other in changed)}) == len(changed) + 1


def test_compose() -> None:
    assert compose("It rains.", "Shout.") == "It rains.\nShout."
    assert compose("It rains.", "Shout.", "pre") == "Shout.\nIt rains."


def test_an_instruction_with_a_contents_file(tmp_path: Path) -> None:
    texts = [f"Sentence number {i} is here." for i in range(100)]
    plain, jsonl = tmp_path / "c.txt", tmp_path / "c.jsonl"
    plain.write_text("\n\n".join(texts), encoding="utf-8")
    jsonl.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[::-1]), encoding="utf-8")
    task = task_from_instruction("Shout.", plain)
    assert {split: len(c) for split, c in task.contents.items()} == {
        "train": 50,
        "dev": 12,
        "test": 38,
    }
    assert sorted(t for c in task.contents.values() for t in c) == sorted(texts)
    # the split belongs to the text, not to its place in the file
    other = task_from_instruction("Shout.", jsonl)
    assert {s: set(c) for s, c in other.contents.items()} == {
        s: set(c) for s, c in task.contents.items()
    }
    assert task_from_instruction("Shout.", plain, seed=1).contents != task.contents
    assert task.verdict("ANYTHING AT ALL", "x") is Verdict.UNDETERMINED


def test_a_bare_instruction_needs_text_and_contents(tmp_path: Path) -> None:
    contents = tmp_path / "c.jsonl"
    with pytest.raises(UserError, match="`contents_file`: no such file"):
        task_from_instruction("Shout.", contents)
    contents.write_text('{"text": "a"}\nnot json\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 2: not valid JSON"):
        task_from_instruction("Shout.", contents)
    with pytest.raises(UsageError, match="`instruction` is empty"):
        task_from_instruction(" ", contents)


@given(st.lists(st.text(min_size=1).map(str.strip).filter(bool), min_size=3, max_size=30))
def test_dealing_keeps_every_text_once_and_fills_each_split(texts: list[str]) -> None:
    texts = list(dict.fromkeys(texts))
    if len(texts) < 3:
        return
    dealt = contents_module._assign_splits("here", texts, 0)
    assert [text for text, _ in dealt] == texts
    assert {split for _, split in dealt} == {"train", "dev", "test"}


def test_reply_prompts_are_as_many_as_asked_and_seeded() -> None:
    prompts = reply_prompts(["french", "json"], contents=5, variants=2, plain=3, seed=4)
    assert [p.task for p in prompts] == ["french"] * 10 + ["json"] * 10 + ["plain"] * 15
    assert len({p.content for p in prompts}) == 5  # the same contents with and without
    assert prompts == reply_prompts(["french", "json"], contents=5, variants=2, plain=3, seed=4)
    assert prompts != reply_prompts(["french", "json"], contents=5, variants=2, plain=3, seed=5)
    first = prompts[0]
    assert first.text == f"{first.content}\n{load_task('french').instruction}"
    assert all(p.text == p.content for p in prompts if p.task == "plain")
    english = reply_prompts(["french"], contents=1, variants=7, plain=0)
    assert all(p.text.isascii() for p in english)


def test_reply_prompts_never_show_dev_or_test_contents_nor_evaluation_wordings() -> None:
    """Ask for everything there is: what could leak would."""
    every = [load_task(name) for name in builtin_tasks()]
    prompts = reply_prompts(every, contents=10_000, variants=100, plain=1)
    everything = "\n".join(p.text for p in prompts)
    held_out = {c for t in every for s in ("dev", "test") for c in t.contents[s]}
    assert len(held_out) > 200
    assert not [content for content in held_out if content in everything]
    lines = set(everything.split("\n"))
    assert lines.isdisjoint(v.text for t in every for v in t.evaluate_variants)
    assert {p.task for p in prompts} == {*builtin_tasks(), "plain"}
    trained = {c for t in every for c in t.contents["train"]}
    assert {p.content for p in prompts} == trained  # the train split is used, whole


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (["french", "french"], {}, "names a task twice"),
        (["french"], {"contents": 0}, "`contents` must be at least 1"),
        (["french"], {"variants": 0}, "`variants` must be at least 1"),
        (["french"], {"plain": -1}, "`plain` must be at least 0"),
        (["frensh"], {}, "unknown task 'frensh'"),
    ],
)
def test_reply_prompts_refuses(names: list[str], options: dict[str, int], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        reply_prompts(names, **options)


def test_reply_prompts_needs_a_train_split(tmp_path: Path) -> None:
    task = load_task(_write(tmp_path, split=["test"]))
    with pytest.raises(UserError, match="no train contents"):
        reply_prompts([task])


def test_a_misspelt_task_is_guessed() -> None:
    with pytest.raises(UsageError, match="unknown task 'bulets' .did you mean bullets"):
        load_task("bulets")
    with pytest.raises(UsageError, match="unknown task 'zzz': `task` takes"):
        load_task("zzz")
