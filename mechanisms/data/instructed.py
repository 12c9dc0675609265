"""Prompts with a marked instruction, whose replies are attributed."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UserError
from saesteer.steering.checks.catalogue import Verdict
from saesteer.steering.tasks.contents import read_text
from saesteer.steering.tasks.task import Placement, Task, compose, load_task


@dataclass(frozen=True)
class InstructedPrompt:
    """A prompt and the characters [start, end) of its instruction."""

    text: str
    span: tuple[int, int]
    reply: str | None = None
    """What is attributed instead of the model's own reply."""
    followed: bool | None = None
    """Whether the reply does what was asked, if known."""
    task: Task | None = None
    content: str = ""

    def judged(self, reply: str) -> bool | None:
        """Whether a reply follows: as the file says, else by the task's check."""
        if self.followed is not None or self.task is None:
            return self.followed
        verdict = self.task.verdict(reply, self.content)
        return None if verdict is Verdict.UNDETERMINED else verdict is Verdict.PASS


def task_prompts(name: str, n: int, seed: int, placement: Placement = "post") -> list[
    InstructedPrompt
]:  # fmt: skip
    """A task's instruction on contents drawn by the seed, after them ("post") or before."""
    task = load_task(name)
    contents = list(task.contents.get("train", ()))
    random.Random(seed).shuffle(contents)
    found = []
    for content in contents[:n]:
        start = len(content) + 1 if placement == "post" else 0
        span = (start, start + len(task.instruction))
        text = compose(content, task.instruction, placement)
        found.append(InstructedPrompt(text, span, task=task, content=content))
    return found


def read_instructed(path: str | Path) -> list[InstructedPrompt]:
    """The rows of a JSONL file: `prompt`, `instruction` ([start, end] in characters, or its text),
    and if wanted `reply` and `followed`. Raises UserError that names the line."""
    found = []
    for number, line in enumerate(read_text(Path(path), "`prompts`").split("\n"), 1):
        if line.strip():
            where = f"{path} line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise UserError(f"{where} is not JSON: one object a line") from None
            found.append(_read(row, where))
    if not found:
        raise UserError(f"{path} holds no prompt: write one object a line")
    return found


def _read(row: Any, where: str) -> InstructedPrompt:
    text = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where} has no text under prompt")
    span = row.get("instruction")
    if isinstance(span, str) and span and span in text:
        span = [text.index(span), text.index(span) + len(span)]
    if not (isinstance(span, list) and len(span) == 2 and all(type(x) is int for x in span)
            and 0 <= span[0] < span[1] <= len(text)):  # fmt: skip
        raise UserError(f"{where}: instruction must be [start, end] in the prompt, or words of it")
    reply, followed = row.get("reply"), row.get("followed")
    if not isinstance(reply, str | None) or not isinstance(followed, bool | None):
        raise UserError(f"{where}: reply must be text and followed true or false")
    return InstructedPrompt(text, (span[0], span[1]), reply, followed)
