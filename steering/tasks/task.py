"""Instruction tasks: an instruction in several wordings, and the contents it is applied to.

A task is a YAML file with the keys of `_TaskFile`; the built-in ones are in `builtin/`. Data that
selects latents and data that evaluates them are kept apart: contents have a split (train, dev,
test) and wordings have a use. The `instruction` itself and every variant without `use: evaluate`
are for selection (ranking, replies to train on); variants with `use: evaluate` are only for
evaluation.
"""

import hashlib
import inspect
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from saesteer.checkpoints.errors import UsageError, UserError, meant
from saesteer.checkpoints.shown import Shown
from saesteer.checkpoints.strict_fields import read_fields
from saesteer.steering.checks.catalogue import CHECKS, Verdict, run_check
from saesteer.steering.checks.readings import loose_variants
from saesteer.steering.tasks.contents import (
    SPLITS,
    Split,
    inline_rows,
    join_contents,
    normal_form,
    read_contents,
    read_text,
    split_rows,
)

BUILTIN_FOLDER = Path(__file__).parent / "builtin"
DEFAULT_CONTENTS = BUILTIN_FOLDER / "contents.jsonl"

PLAIN = "plain"
"""The task name of contents without an instruction in `reply_prompts`."""

Placement = Literal["post", "pre"]
Use = Literal["select", "evaluate"]


@dataclass(frozen=True)
class Variant:
    """One wording of an instruction."""

    text: str
    """The wording, which `compose` joins to a content."""
    lang: str = "en"
    """ISO 639-1 code of the language the wording is written in."""
    use: Use = "select"
    """What the wording is for: selecting latents, or evaluating them."""


@dataclass(frozen=True, repr=False)
class Task(Shown):
    """One instruction with its wordings, its contents by split, and the check that grades it."""

    name: str
    """Short name, used in plans, reports and file names."""
    instruction: str
    """The main wording, for selection: the first of `select_variants`."""
    variants: tuple[Variant, ...]
    """Reformulations and translations of the instruction, without the main wording."""
    contents: dict[str, tuple[str, ...]]
    """Contents by split; the keys are some of train, dev, test."""
    check_name: str | None = None
    """Name in `checks.catalogue.CHECKS`; None when no program can grade this task."""
    check_arguments: Mapping[str, Any] | None = None
    """Keyword arguments of the check."""
    max_new_tokens: int = 64
    """Longest reply in tokens: enough for the prompted model to finish an answer."""

    def _facts(self) -> dict[str, Any]:
        return {
            "name": repr(self.name),
            "instruction": repr(self.instruction),
            "wordings": len(self.wordings),
            "contents": {split: len(texts) for split, texts in self.contents.items()},
            "check": self.check_name,
        }

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) over the canonical JSON of every field, contents included."""
        facts = {
            "name": self.name,
            "instruction": self.instruction,
            "variants": [[v.text, v.lang, v.use] for v in self.variants],
            "contents": {split: list(texts) for split, texts in self.contents.items()},
            "check": [self.check_name, dict(self.check_arguments or {})],
            "max_new_tokens": self.max_new_tokens,
        }
        text = json.dumps(facts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        # surrogatepass: JSON strings may hold lone surrogates, and a hash must not fail on them
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def select_variants(self) -> tuple[Variant, ...]:
        """The wordings for selection: the instruction first, then English ones, then others."""
        chosen = [Variant(self.instruction), *(v for v in self.variants if v.use == "select")]
        return tuple(sorted(chosen, key=lambda variant: variant.lang != "en"))

    @property
    def wordings(self) -> tuple[str, ...]:
        """The texts of all wordings, whatever their use; the instruction first."""
        return (self.instruction, *(variant.text for variant in self.variants))

    @property
    def evaluate_variants(self) -> tuple[Variant, ...]:
        """The wordings for evaluation, English first."""
        chosen = [v for v in self.variants if v.use == "evaluate"]
        return tuple(sorted(chosen, key=lambda variant: variant.lang != "en"))

    def verdict(self, output: str, source: str) -> Verdict:
        """Grade one answer to `source` (a content). A task without a check is undetermined."""
        if self.check_name is None:
            return Verdict.UNDETERMINED
        return run_check(self.check_name, output, source, **(self.check_arguments or {}))

    def passes_loosely(self, output: str, source: str) -> bool:
        """Whether the check passes on one of the answer's eight readings (`loose_variants`)."""
        return any(
            self.verdict(reading, source) is Verdict.PASS for reading in loose_variants(output)
        )


@dataclass(frozen=True)
class Instructed:
    """A prompt for the model to answer: a content with an instruction, or a content alone."""

    task: str
    """The task's name, or "plain" for a content alone."""
    variant: int
    """Index into `Task.select_variants`; for plain texts, which repetition this is."""
    content: str
    """The content without an instruction."""
    text: str
    """The prompt: the composed text, or the content itself when plain."""


def builtin_tasks() -> list[str]:
    """The names of the built-in tasks, in alphabetical order."""
    return sorted(path.stem for path in BUILTIN_FOLDER.glob("*.yaml"))


def compose(content: str, instruction: str, placement: Placement = "post") -> str:
    """Join a content and an instruction on two lines: content first ("post") or last ("pre")."""
    if placement == "post":
        return f"{content}\n{instruction}"
    if placement == "pre":
        return f"{instruction}\n{content}"
    raise UsageError(
        f"unknown placement {placement!r}: use post (content, then instruction) or pre"
    )


def load_task(name_or_path: str | Path) -> Task:
    """Load a built-in task by name, or a task from a YAML file.

    Raises `UsageError` for a name that is neither, `UserError` for a file that cannot be read or
    whose content is wrong; the message names the file and the key.
    """
    name = str(name_or_path)
    if name in builtin_tasks():
        return _read_task(BUILTIN_FOLDER / f"{name}.yaml")
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return _read_task(path)
    raise UsageError(
        f"unknown task {name!r}{meant(name, builtin_tasks())}: `task` takes a built-in name "
        f"({', '.join(builtin_tasks())}) or the path of a .yaml file"
    )


def task_from_instruction(instruction: str, contents_file: str | Path, *, seed: int = 0) -> Task:
    """A task from a bare instruction and a file of contents.

    The file is JSONL with the field `text` (and, on every row or on none, `split`), or plain text
    with one content per line. Without splits, contents are divided 50/12/38 % into train, dev and
    test by a hash of `seed` and text, so the order of the lines does not matter. The task has no
    check. Raises UsageError for an empty instruction, UserError for a file that cannot be read.
    """
    if not instruction.strip():
        raise UsageError("`instruction` is empty: give the instruction's text")
    contents = read_contents(Path(contents_file), SPLITS, seed, what="`contents_file`")
    return Task("custom", instruction.strip(), (), contents)


def reply_prompts(
    tasks: Sequence[str | Path | Task],
    *,
    contents: int = 48,
    variants: int = 2,
    plain: int = 3,
    seed: int = 0,
    placement: Placement = "post",
) -> list[Instructed]:
    """Prompts for the model to answer, so that SAEs can be trained on the instructed behaviour.

    For each task (name, path or `Task`), at most `contents` contents of its **train** split are
    drawn with `seed`, and each is joined to the first `variants` selection wordings (English
    first). Then every content drawn follows alone, `plain` times. Two tasks with the same contents
    draw the same ones. Dev and test contents and evaluation wordings are never used.

    Raises UsageError for numbers out of range or a task given twice, UserError for a task without
    train contents.
    """
    for name, value, least in (
        ("`contents`", contents, 1),
        ("`variants`", variants, 1),
        ("`plain`", plain, 0),
    ):
        if value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}")
    loaded = [task if isinstance(task, Task) else load_task(task) for task in tasks]
    names = [task.name for task in loaded]
    if len(set(names)) != len(names):
        raise UsageError(f"`replies` names a task twice: {', '.join(names)}; name each once")
    prompts: list[Instructed] = []
    drawn: dict[str, None] = {}  # an ordered set
    for task in loaded:
        train = list(task.contents.get("train", ()))
        if not train:
            raise UserError(f"task {task.name!r} has no train contents, which `replies` needs")
        chosen = random.Random(seed).sample(train, min(contents, len(train)))
        drawn.update(dict.fromkeys(chosen))
        for index, variant in enumerate(task.select_variants[:variants]):
            prompts += [
                Instructed(task.name, index, content, compose(content, variant.text, placement))
                for content in chosen
            ]
    for repetition in range(plain):
        prompts += [Instructed(PLAIN, repetition, content, content) for content in drawn]
    return prompts


# --- reading a task file -------------------------------------------------------------------------


@dataclass(frozen=True)
class _CheckLine:
    name: str
    arguments: dict[str, Any] | None = None


@dataclass(frozen=True)
class _TaskFile:
    """The keys of a task file."""

    name: str
    instruction: str
    variants: tuple[Variant, ...]
    check: _CheckLine
    contents: str | tuple[Any, ...] | None = None
    contents_per_item: int = 1
    split: tuple[Split, ...] = SPLITS
    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        texts = {"name": self.name, "instruction": self.instruction}
        for number, variant in enumerate(self.variants, 1):
            texts[f"variants[{number}].text"] = variant.text
            texts[f"variants[{number}].lang"] = variant.lang
        for key, text in texts.items():
            if not text.strip():
                raise ValueError(f"key {key!r} must be a non-empty text, got {text!r}")
        if self.name.strip() == PLAIN:
            raise ValueError(f"key 'name' is {PLAIN!r}, which is reserved; choose another name")
        seen = {normal_form(self.instruction)}
        for number, variant in enumerate(self.variants, 1):
            if normal_form(variant.text) in seen:
                key = f"variants[{number}].text"
                raise ValueError(f"key {key!r} repeats an earlier wording: {variant.text!r}")
            seen.add(normal_form(variant.text))
        if not self.split:
            raise ValueError(f"key 'split' must name some of {', '.join(SPLITS)}, got none")
        for key in ("contents_per_item", "max_new_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"key {key!r} must be at least 1, got {getattr(self, key)}")


def _read_task(path: Path) -> Task:
    read = read_fields(_TaskFile, _read_yaml(path), str(path))
    splits = tuple(split for split in SPLITS if split in read.split)
    if isinstance(read.contents, tuple):
        rows = inline_rows(path, read.contents)
        contents = split_rows(f"{path}: contents", rows, splits, 0)
    elif read.contents is None:
        contents = read_contents(DEFAULT_CONTENTS, splits, 0, what="contents")
    else:
        named = path.parent / read.contents.strip()
        contents = read_contents(named, splits, 0, what=f"contents of {path}")
    return Task(
        name=read.name.strip(),
        instruction=read.instruction.strip(),
        variants=tuple(Variant(v.text.strip(), v.lang.strip(), v.use) for v in read.variants),
        contents=join_contents(path, contents, read.contents_per_item),
        check_name=read.check.name,
        check_arguments=_check_arguments(path, read.check),
        max_new_tokens=read.max_new_tokens,
    )


def _read_yaml(path: Path) -> object:
    import yaml

    from saesteer.checkpoints.yaml_text import parse_yaml

    text = read_text(path, "`task`")
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}: not valid YAML{where}; see the keys of a task file") from None


def _check_arguments(path: Path, check: _CheckLine) -> dict[str, Any]:
    """The arguments of a check that fit it."""
    name, arguments = check.name, check.arguments or {}
    if name not in CHECKS:
        raise UserError(
            f"{path}: key 'check.name' is {name!r}; the checks are {', '.join(sorted(CHECKS))}"
        )
    try:
        inspect.signature(CHECKS[name]).bind("", "", **arguments)
        run_check(name, "", "", **arguments)  # raises for a wrong value
    except TypeError as error:
        raise UserError(f"{path}: key 'check.arguments' does not fit {name!r}: {error}") from None
    except UsageError as error:
        raise UserError(f"{path}: key 'check.arguments': {error}") from None
    return arguments
