"""Prompts whose states are read: what each is a case of, and where in it to look."""

import json
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.model.hooks import hooked, resolve_site
from saesteer.sae.model.language_model import LanguageModel, uncompiled
from saesteer.sae.text.prompts import encode_prompt
from saesteer.steering.tasks.contents import read_text
from saesteer.steering.tasks.task import compose, load_task

Span = tuple[int, int]
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class StateRow:
    """One prompt."""

    text: str
    label: str
    """What should be told apart: a task."""
    group: str
    """What must not be on both sides of a split: a wording."""
    input: str = ""
    """What the label is applied to."""
    split: str = "train"
    answers: Mapping[str, str] = field(default_factory=dict)
    """Label -> what that task answers to this input."""
    positions: Mapping[str, Span] = field(default_factory=dict)
    """Name -> characters [start, end); its last token is read."""


_FIELDS: dict[str, type] = {
    "text": str, "label": str, "group": str, "input": str, "split": str, "answers": dict,
    "positions": dict,
}  # fmt: skip


def read_state_rows(path: str | Path) -> list[StateRow]:
    """The rows of a JSONL file: `text`, `label`, `group`, and if wanted `input`, `split`,
    `answers` and `positions` ({name: [start, end]}). Raises UserError that names the line."""
    rows = []
    for number, line in enumerate(read_text(Path(path), "`states`").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{where} is not JSON: one object a line") from None
        if not isinstance(row, dict):
            raise UserError(f"{where} is not an object with text, label and group")
        for key, value in row.items():
            if key not in _FIELDS:
                raise UserError(f"{where}: unknown key {key!r}; known are {', '.join(_FIELDS)}")
            if not isinstance(value, _FIELDS[key]):
                raise UserError(f"{where}: {key} is no {_FIELDS[key].__name__}: {value!r}")
        for key in ("text", "label", "group"):
            if not row.get(key, "").strip():
                raise UserError(f"{where}: {key} is missing or empty")
        for name, span in row.get("positions", {}).items():
            if not (isinstance(span, list) and len(span) == 2 and all(type(x) is int for x in span)
                    and 0 <= span[0] < span[1] <= len(row["text"])):  # fmt: skip
                raise UserError(f"{where}: position {name!r} must be [start, end] in the text")
        row["positions"] = {name: tuple(span) for name, span in row.get("positions", {}).items()}
        rows.append(StateRow(**row))
    if not rows:
        raise UserError(f"{path} holds no row: write one object a line")
    return rows


def write_states(rows: Sequence[StateRow]) -> str:
    """Rows as the text of a JSONL file, which `read_state_rows` takes."""
    return "".join(json.dumps(vars(row), ensure_ascii=False) + "\n" for row in rows)


def task_states(names: Sequence[str], contents: int, seed: int) -> list[StateRow]:
    """Every wording of built-in tasks with the same contents, drawn by the seed.

    Raises UsageError for fewer than two tasks, or unknown ones.
    """
    if len(names) < 2:
        raise UsageError(f"`tasks` must name at least two tasks, got {', '.join(names) or 'none'}")
    tasks = [load_task(name) for name in names]
    pool = list(tasks[0].contents.get("train", ()))
    random.Random(seed).shuffle(pool)
    rows = []
    for task in tasks:
        for number, wording in enumerate(task.wordings):
            for content in pool[:contents]:
                text = compose(content, wording)
                start = len(content) + 1
                rows.append(
                    StateRow(
                        text=text, label=task.name, group=f"{task.name} {number}", input=content,
                        positions={"query": (0, len(content)), "instruction": (start, len(text))},
                    )
                )  # fmt: skip
    return rows


@dataclass(frozen=True, eq=False)
class States:
    """States of rows at named positions."""

    at: Mapping[str, Tensor]
    """Position -> `[rows, layers + 1, d_model]`, float32."""
    ids: list[list[int]]
    places: Mapping[str, list[int]]
    """Position -> the token of each row."""
    logits: Tensor
    """At the last token, `[rows, vocabulary]`."""


@torch.no_grad()
def read_states(
    lm: LanguageModel,
    rows: Sequence[StateRow],
    at: Sequence[str],
    *,
    site: str = "resid_post",
    chat: bool = False,
) -> States:
    """Read every layer at some positions: `last`, or names of the rows.

    Layer 0 is the first block's input, layer l + 1 the site of block l. Raises UsageError for a
    position that a row does not have.
    """
    ids, places = encode_rows(lm, rows, at, chat=chat)
    points = [resolve_site(lm, 0, "resid_pre")]
    points += [resolve_site(lm, layer, site) for layer in range(lm.n_layers)]
    found = {name: torch.empty(len(rows), len(points), lm.d_model) for name in at}
    logits = []
    for own, batch in batches(ids, lm.pad_id):
        seen: list[Tensor] = []
        with ExitStack() as stack:
            for point in points:
                stack.enter_context(hooked(point, seen.append))
            out = uncompiled(lm.model)(input_ids=batch.to(lm.device), use_cache=False).logits
        row = torch.arange(len(own))
        for name in at:
            where = torch.tensor([places[name][i] for i in own])
            for layer, h in enumerate(seen):
                found[name][own, layer] = h[row, where].float().cpu()
        logits.append((own, out[row, [len(ids[i]) - 1 for i in own]].float().cpu()))
    whole = torch.empty(len(rows), logits[0][1].shape[1])
    for own, values in logits:
        whole[own] = values
    return States(found, ids, places, whole)


def encode_rows(
    lm: LanguageModel, rows: Sequence[StateRow], at: Sequence[str], *, chat: bool = False
) -> tuple[list[list[int]], dict[str, list[int]]]:
    """Token ids of every row, and the token of each position in it."""
    ids: list[list[int]] = []
    places: dict[str, list[int]] = {name: [] for name in at}
    for number, row in enumerate(rows, 1):
        prompt = encode_prompt(lm, row.text, chat=chat)
        ids.append(prompt.token_ids)
        for name in at:
            if name == "last":
                places[name].append(len(prompt) - 1)
            elif name in row.positions:
                places[name].append(prompt.token_span(*row.positions[name])[1] - 1)
            else:
                known = ", ".join(["last", *row.positions])
                raise UsageError(f"`at` {name!r} is no position of row {number}: it has {known}")
    return ids, places


def batches(ids: Sequence[Sequence[int]], pad: int) -> list[tuple[list[int], Tensor]]:
    """Rows of like length together, padded at the end, where nothing that is read attends."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found = []
    while order:
        longest = len(ids[order[0]])
        size = max(1, _BATCH_TOKENS // (longest + 8))
        own, order = order[:size], order[size:]
        longest = len(ids[own[-1]])
        batch = [[*ids[i], *[pad] * (longest - len(ids[i]))] for i in own]
        found.append((own, torch.tensor(batch)))
    return found


def answer_ids(lm: LanguageModel, rows: Sequence[StateRow]) -> list[dict[str, int]]:
    """First token of what each label answers after a row; empty where rows have no answers."""
    known: dict[str, int] = {}

    def first(text: str) -> int:
        if text not in known:
            known[text] = int(lm.tokenizer(text, add_special_tokens=False)["input_ids"][0])
        return known[text]

    return [{label: first(text) for label, text in row.answers.items()} for row in rows]
