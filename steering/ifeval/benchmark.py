"""IFEval: reads the standard JSONL, answers the prompts, and computes its four accuracies."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.steering.checks.readings import loose_variants
from saesteer.steering.checks.words import without_thinking
from saesteer.steering.evaluation.arms import Decoding, answer
from saesteer.steering.evaluation.intervals import paired_difference, sign_test
from saesteer.steering.evaluation.rates import Rate
from saesteer.steering.hooking.arrangement import ByRow
from saesteer.steering.ifeval.checkers import CHECKERS, stand_ins
from saesteer.steering.plans.plan import Plan
from saesteer.steering.tasks.task import Task

INSTRUCTION_OF = {
    "no_comma": "punctuation:no_comma",
    "uppercase": "change_case:english_capital",
    "lowercase": "change_case:english_lowercase",
    "json": "detectable_format:json_format",
    "quotes": "startend:quotation",
    "bullets": "detectable_format:number_bullet_lists",
    "title": "detectable_format:title",
    "end_phrase": "startend:end_checker",
    "language": "language:response_language",
    "keyword": "keywords:existence",
    "forbidden": "keywords:forbidden_words",
}
"""The IFEval instruction that corresponds to a task, by the name of the task's check."""


@dataclass(frozen=True)
class IFEvalPrompt:
    """One row of the data."""

    key: int | str
    """What the data calls it; the number of its line where it has no name."""
    prompt: str
    instructions: tuple[str, ...]
    kwargs: tuple[Mapping[str, Any], ...]
    """One mapping for each instruction."""
    plain: str | None = None
    """The prompt without its instruction, where the data has it."""


@dataclass(frozen=True)
class InstructionVerdict:
    """The verdicts on one instruction of one prompt."""

    instruction: str
    strict: bool
    loose: bool


def load_ifeval(path: str | Path) -> list[IFEvalPrompt]:
    """Read the standard JSONL: key, prompt, instruction_id_list, kwargs.

    Rows may hold `prompt_without_instruction`. Raises UserError, naming file and line, for a row
    that lacks a field or names an instruction that is none of the 25.
    """
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # not at U+2028 within a text
    except FileNotFoundError:
        raise UserError(f"`ifeval` {path} does not exist: check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`ifeval` {path} cannot be read ({error})") from None
    prompts = [
        _row(line, f"`ifeval` {path} line {number}", number)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not prompts:
        raise UserError(f"`ifeval` {path} holds no prompt: one JSON object a line")
    return prompts


def _row(line: str, where: str, number: int) -> IFEvalPrompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where} is not JSON: one object a line") from None
    names = row.get("instruction_id_list") if isinstance(row, dict) else None
    if not isinstance(names, list) or not isinstance(row.get("prompt"), str) or not names:
        raise UserError(f"{where} lacks prompt or instruction_id_list: see the IFEval data")
    unknown = [name for name in names if name not in CHECKERS]
    if unknown:
        raise UserError(
            f"{where} names {unknown[0]!r}, none of the {len(CHECKERS)} instructions of IFEval"
        )
    kwargs = row.get("kwargs") or [{} for _ in names]
    if not isinstance(kwargs, list) or len(kwargs) != len(names):
        raise UserError(f"{where} has {len(names)} instructions but not as many kwargs")
    given = tuple(
        {key: value for key, value in _kwargs(one, where).items() if value is not None}
        for one in kwargs
    )
    key = row.get("key")
    plain = row.get("prompt_without_instruction")
    prompt = IFEvalPrompt(
        key if isinstance(key, int | str) and key != "" else number,
        row["prompt"],
        tuple(names),
        given,
        plain if isinstance(plain, str) and plain.strip() else None,
    )
    try:
        follow(prompt, "x")
    except re.error as error:
        raise UserError(
            f"{where} has a keyword that is no regular expression ({error}), as which IFEval reads "
            "it: write a backslash before ( ) [ ] * + ? . ^ $ |"
        ) from None
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise UserError(f"{where} has kwargs that do not fit: {error}") from None
    return prompt


def _kwargs(given: Any, where: str) -> dict[str, Any]:
    """The arguments of one instruction: an object, or the text of one."""
    if isinstance(given, str):
        try:
            given = json.loads(given or "{}")
        except (ValueError, RecursionError):
            raise UserError(f"{where} has kwargs that are no JSON objects") from None
    if given is not None and not isinstance(given, dict):
        raise UserError(f"{where} has kwargs that are no objects: one for each instruction")
    return given or {}


def follow(prompt: IFEvalPrompt, reply: str) -> list[InstructionVerdict]:
    """Strict and loose verdicts on every instruction of a prompt. An empty reply follows none.

    Strict: the checker accepts the reply as it is. Loose: it accepts one of its eight readings.
    Thoughts before the answer are no part of the reply.
    """
    found = []
    reply = without_thinking(reply)
    readings = [text for text in loose_variants(reply) if text.strip()]
    for name, kwargs in zip(prompt.instructions, prompt.kwargs, strict=True):
        checker = CHECKERS[name]
        strict = bool(reply.strip()) and checker(reply, **kwargs)
        loose = strict or any(checker(text, **kwargs) for text in readings)
        found.append(InstructionVerdict(name, strict, loose))
    return found


@dataclass(frozen=True)
class IFEvalScores:
    """The four accuracies of IFEval, and those by instruction."""

    prompt_strict: Rate
    prompt_loose: Rate
    instruction_strict: Rate
    instruction_loose: Rate
    by_type: Mapping[str, tuple[Rate, Rate]]
    """Strict and loose, by instruction."""

    def row(self) -> dict[str, Any]:
        """Everything, JSON-ready."""
        return {
            "prompt_strict": asdict(self.prompt_strict),
            "prompt_loose": asdict(self.prompt_loose),
            "instruction_strict": asdict(self.instruction_strict),
            "instruction_loose": asdict(self.instruction_loose),
            "by_type": {
                name: {"strict": asdict(strict), "loose": asdict(loose)}
                for name, (strict, loose) in sorted(self.by_type.items())
            },
        }


def ifeval_scores(verdicts: Sequence[Sequence[InstructionVerdict]]) -> IFEvalScores:
    """Accuracies of replies, given the verdicts on each."""
    flat = [one for row in verdicts for one in row]
    by_type: defaultdict[str, list[InstructionVerdict]] = defaultdict(list)
    for one in flat:
        by_type[one.instruction].append(one)
    return IFEvalScores(
        Rate.of([all(one.strict for one in row) for row in verdicts]),
        Rate.of([all(one.loose for one in row) for row in verdicts]),
        Rate.of([one.strict for one in flat]),
        Rate.of([one.loose for one in flat]),
        {
            name: (Rate.of([one.strict for one in rows]), Rate.of([one.loose for one in rows]))
            for name, rows in by_type.items()
        },
    )


def plan_for_row(row: IFEvalPrompt, plans: Sequence[tuple[Task, Plan]]) -> Plan | None:
    """The first plan whose task corresponds to the row's only instruction, or None.

    A language, an end phrase and keywords have to be equal to those of the task.
    """
    if len(row.instructions) != 1:
        return None
    (kwargs,) = row.kwargs
    for task, plan in plans:
        if INSTRUCTION_OF.get(task.check_name or "") != row.instructions[0]:
            continue
        ours = task.check_arguments or {}
        pairs = (
            ("language", ours.get("lang")),
            ("end_phrase", ours.get("phrase")),
            ("keywords", [ours.get("keyword")]),
            ("forbidden_words", ours.get("keywords")),
        )
        if all(kwargs[name] == wanted for name, wanted in pairs if name in kwargs):
            return plan
    return None


def chosen_rows(
    prompts: Sequence[IFEvalPrompt],
    *,
    steered: bool,
    matched: Sequence[tuple[Task, Plan]] = (),
    only: Sequence[str] = (),
    n: int | None = None,
) -> list[IFEvalPrompt]:
    """The rows that `evaluate_ifeval` answers. Raises UserError when none is left."""
    chosen = [row for row in prompts if not only or set(row.instructions) <= set(only)]
    if steered:
        chosen = [row for row in chosen if row.plain is not None]
    if matched:
        chosen = [row for row in chosen if plan_for_row(row, matched) is not None]
    chosen = chosen[: len(chosen) if n is None else n]
    if not chosen:
        raise UserError(
            "no IFEval row is left: `plan` needs rows with prompt_without_instruction and an "
            "instruction that the plan is for, `only` the ids of instructions that occur"
        )
    return chosen


def evaluate_ifeval(
    model: str | LanguageModel,
    prompts: Sequence[IFEvalPrompt],
    plans: Mapping[str, Plan] | None = None,
    *,
    only: Sequence[str] = (),
    n: int | None = None,
    matched: Sequence[tuple[Task, Plan]] = (),
    max_new_tokens: int = 256,
    decoding: Decoding = Decoding(temperature=0.0),  # noqa: B008 (frozen: one may serve all)
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Answer IFEval prompts and grade the answers.

    Arms: `prompted` (the prompts as they are). Where all rows have a prompt without instruction,
    also `unsteered` (that prompt) and each plan (that prompt, steered). With `matched`, the arms
    `steered` and `steered + prompted` use for each row the plan for its instruction.

    Args:
        plans: each steers every row.
        matched: plans with the tasks they are for; rows without a plan by `plan_for_row` are left
            out. Not together with `plans`.
        only: keep rows all of whose instructions are among these ids; with `plans`, give the ids
            that the plans are for.
        n: keep at most this many rows, the first ones.

    Returns:
        JSON-ready: scores and answers by arm, paired tests of every steered arm against the other
        two, prompt by prompt, and the replacements used for missing packages.

    Raises:
        UserError: no row is left, or plans were given and no row has a prompt without instruction.
    """
    chosen = chosen_rows(prompts, steered=bool(plans or matched), matched=matched, only=only, n=n)
    if plans and {"prompted", "unsteered"} & plans.keys():
        raise UsageError("a plan cannot be called prompted or unsteered, as other arms are")
    lm = as_language_model(model, device=device, dtype=dtype)
    asked = [row.prompt for row in chosen]
    arms: list[tuple[str, list[str], Plan | ByRow | None]] = [("prompted", asked, None)]
    if all(row.plain is not None for row in chosen):
        plain = [row.plain or "" for row in chosen]
        arms.append(("unsteered", plain, None))
        arms += [(name, plain, plan) for name, plan in (plans or {}).items()]
        if matched:
            by_row = ByRow([plan_for_row(row, matched) for row in chosen])
            arms += [("steered", plain, by_row), ("steered + prompted", asked, by_row)]
    found: dict[str, Any] = {}
    verdicts_of: dict[str, list[list[InstructionVerdict]]] = {}
    for name, texts, plan in arms:
        replies = answer(
            lm, texts, plan, max_new_tokens, replace(decoding), f"IFEval: {name}", progress
        )
        verdicts = [
            follow(row, reply.completion) for row, reply in zip(chosen, replies, strict=True)
        ]
        verdicts_of[name] = verdicts
        found[name] = {
            "scores": ifeval_scores(verdicts).row(),
            "answers": [
                {
                    "key": row.key,
                    "prompt": reply.prompt,
                    "output": reply.completion,
                    "instructions": [asdict(one) for one in verdict],
                }
                for row, reply, verdict in zip(chosen, replies, verdicts, strict=True)
            ],
        }
    return {
        "prompts": len(chosen),
        "stand_ins": stand_ins(),
        "arms": found,
        "tests": _paired_tests(verdicts_of),
    }


def _paired_tests(
    verdicts: Mapping[str, Sequence[Sequence[InstructionVerdict]]],
) -> list[dict[str, Any]]:
    """Every steered arm against unsteered and prompted, prompt by prompt."""
    tests = []
    for ours in verdicts:
        if ours in ("prompted", "unsteered"):
            continue
        for theirs in ("unsteered", "prompted"):
            for measure in ("loose", "strict"):
                one, other = (
                    [float(all(getattr(each, measure) for each in row)) for row in verdicts[name]]
                    for name in (ours, theirs)
                )
                gap = paired_difference(one, other)
                more, less, p = sign_test(one, other)
                tests.append(
                    {
                        "ours": ours,
                        "theirs": theirs,
                        "measure": measure,
                        "difference": gap.value,
                        "low": gap.low,
                        "high": gap.high,
                        "wins": more,
                        "losses": less,
                        "p": p,
                    }
                )
    return tests
