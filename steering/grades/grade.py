"""The three grades of a reply, and `strict`, which is all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.steering.checks.registry import Verdict
from saesteer.steering.checks.words import without_thinking
from saesteer.steering.grades import faithful as faith
from saesteer.steering.grades import natural as nature
from saesteer.steering.grades import real_words, repetition, word_order
from saesteer.steering.grades.faithful import Faithful, faithful, kind_of
from saesteer.steering.grades.fluent import (
    Fluent,
    content_language,
    fluent,
    with_naturalness,
)
from saesteer.steering.grades.instructed import InstructedScore, instructed_scores
from saesteer.steering.grades.natural import naturalness, own_range
from saesteer.steering.grades.own_answers import own_answers
from saesteer.steering.tasks.task import Task, load_task

GRADES = ("follows", "fluent", "faithful", "strict")
"""The grades in the order in which they are shown."""

DEFINITIONS: Mapping[str, str] = {
    "follows": "the task's check passes on the answer, or on one of IFEval's eight loose readings",
    "fluent": "no loop; at least 90 % of its words exist in the language, and no three in a row do "
    "not; function words stand where they can; to the unsteered model, where there is one, as "
    "natural as its own answers, and likelier than its words in other orders",
    "faithful": "the content is there: the share of the source's content words that the answer "
    "holds, by lemma, in translations through bilingual dictionaries, reaches the task's floor",
    "strict": "follows and fluent and faithful",
}
"""What each grade means, as reports say it."""


@dataclass(frozen=True)
class Grades:
    """The grades of one reply, with their parts."""

    follows: bool
    """The check passes, as it is or on one of the loose readings."""
    verdict: Verdict
    """The check's verdict on the reply as it is."""
    fluency: Fluent
    faithfulness: Faithful
    instructed: InstructedScore | None = None
    """Its log-probability with and without the instruction, where a model judged it."""

    @property
    def fluent(self) -> bool | None:
        """Whether it is fluent; None where that could not be judged."""
        return self.fluency.passes

    @property
    def faithful(self) -> bool | None:
        """Whether the content is there; None where that could not be judged."""
        return self.faithfulness.passes

    @property
    def strict(self) -> bool | None:
        """All three; None where one could not be judged and no other fails."""
        parts = (self.follows, self.fluent, self.faithful)
        if False in parts:
            # Even so a task that cannot be graded has no strict rate: failures alone would show.
            return None if None in parts else False
        return None if None in parts else True

    def grade(self, name: str) -> bool | None:
        """One of `GRADES` by its name."""
        found = {
            "follows": self.follows,
            "fluent": self.fluent,
            "faithful": self.faithful,
            "strict": self.strict,
        }
        return found[name]

    def row(self) -> dict[str, Any]:
        """The grades and their parts, JSON-ready."""
        score = self.instructed
        return {
            **{name: self.grade(name) for name in GRADES},
            "parts": {
                "check": self.verdict.value,
                "fluent": {k: v for k, v in asdict(self.fluency).items() if k != "passes"},
                "faithful": {k: v for k, v in asdict(self.faithfulness).items() if k != "passes"},
                "instructed": None if score is None else {**asdict(score), "gain": score.gain},
            },
        }


def not_graded(grades: Sequence[Grades]) -> dict[str, str]:
    """Why a grade is missing in some answer, by the name of the grade."""
    reasons: dict[str, str] = {}
    for name in ("fluent", "faithful"):
        for one in grades:
            part: Fluent | Faithful = one.fluency if name == "fluent" else one.faithfulness
            if part.passes is None:
                reasons[name] = part.reason
                break
    if reasons:
        reasons["strict"] = f"not graded, because {' and '.join(reasons)} could not be"
    return reasons


@dataclass
class Grader:
    """Grades replies to the contents of one task.

    Without a model everything but naturalness and the instructed model's log-probability is
    judged. Make one for a task and keep it: dictionaries and word lists are read once.
    """

    task: Task
    lm: LanguageModel | None = None
    """The unsteered model, which judges naturalness."""
    dictionaries: str | Path | None = None
    """Folder of bilingual dictionaries; by default `dictionaries.dictionary_folder`."""
    own: Sequence[str] = ()
    """The unsteered model's own answers, prompted and not: their perplexities are the range for
    answers in the content's language. With fewer than eight only the order of words is judged."""
    scored: bool = True
    """Whether the model also gives each reply its log-probability (`instructed_scores`)."""
    source_lang: str | None = None
    """Language of the contents; by default what py3langid finds."""
    within: tuple[float, float] | None = field(default=None, init=False)
    """That range, in nats per token."""

    def __post_init__(self) -> None:
        if self.task.check_name is None:
            raise UserError(
                f"task {self.task.name!r} has no check, so no answer can be graded: give `task` a "
                "file that names a check"
            )
        if self.source_lang is None:
            texts = [text for split in self.task.contents.values() for text in split[:20]]
            self.source_lang = content_language(" ".join(texts))
        if self.lm is not None and self.own and self.lang == self.source_lang:
            own = [without_thinking(answer) for answer in self.own]
            judged = naturalness(self.lm, own, shuffled=[False] * len(own))
            self.within = own_range([one.nats for one in judged if one.nats is not None])

    @property
    def lang(self) -> str:
        """The language that answers should be in: the check's, or that of the contents."""
        asked = (self.task.check_arguments or {}).get("lang")
        assert self.source_lang is not None
        if self.task.check_name in ("language", "translation") and isinstance(asked, str):
            return asked
        return self.source_lang

    @property
    def least_gain(self) -> float:
        """Nats a word by which a reply has to be likelier to the model than in random orders."""
        here = self.lang == self.source_lang
        return nature.LEAST_GAIN if here else nature.LEAST_GAIN_ELSEWHERE

    def grade(
        self,
        contents: Sequence[str],
        answers: Sequence[str],
        *,
        token_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[Grades]:
        """Grade answers to contents, in the order given.

        Args:
            token_ids: of the answers, by which loops are found; by default their words are.

        Raises UsageError where contents and answers differ in number.
        """
        if len(contents) != len(answers):
            raise UsageError(
                f"`answers` has {len(answers)} entries for {len(contents)} contents; pair them up"
            )
        task, source_lang = self.task, self.source_lang
        assert source_lang is not None
        said = [without_thinking(answer) for answer in answers]
        scores: list[InstructedScore | None] = [None] * len(said)
        if self.lm is not None and self.scored:
            scores = list(instructed_scores(self.lm, task, contents, said))
        found = []
        for i, (content, answer, reply) in enumerate(zip(contents, answers, said, strict=True)):
            verdict = task.verdict(answer, content)
            found.append(
                Grades(
                    verdict is Verdict.PASS or task.passes_loosely(answer, content),
                    verdict,
                    fluent(
                        reply,
                        content,
                        check_name=task.check_name,
                        lang=self.lang,
                        source_lang=source_lang,
                        tokens=None if token_ids is None else token_ids[i],
                    ),
                    faithful(
                        reply,
                        content,
                        check_name=task.check_name,
                        lang=self.lang,
                        source_lang=source_lang,
                        dictionaries=self.dictionaries,
                    ),
                    scores[i],
                )
            )
        if self.lm is not None:
            # The model is slow: it reads only what nothing else has told from natural text.
            open_ones = [i for i, one in enumerate(found) if one.fluent]
            judged = naturalness(
                self.lm,
                [said[i] for i in open_ones],
                within=self.within,
                least_gain=self.least_gain,
            )
            for i, one in zip(open_ones, judged, strict=True):
                found[i] = replace(found[i], fluency=with_naturalness(found[i].fluency, one))
        return found

    def floors(self) -> dict[str, Any]:
        """The thresholds that apply, JSON-ready, for reports."""
        kind = kind_of(self.task.check_name)
        return {
            "degenerate_share": repetition.DEGENERATE_SHARE,
            "real_words": real_words.LEAST_SHARE,
            "word_frequency": real_words.REAL_WORD,
            "order_breaks": word_order.MOST_BREAKS,
            "order_gain": None if self.lm is None else self.least_gain,
            "nats": None if self.within is None else list(self.within),
            "content": kind,
            "coverage": faith.FLOORS[kind],
            "words_found": faith.FEWEST_FOUND,
        }


def grade(
    task: str | Path | Task,
    contents: Sequence[str],
    answers: Sequence[str],
    *,
    model: str | LanguageModel | None = None,
    dictionaries: str | Path | None = None,
    own: Sequence[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = no_progress,
) -> list[Grades]:
    """Grade answers made anywhere: `follows`, `fluent`, `faithful` and `strict` with their parts.

    Args:
        contents: what the instruction was applied to, one for each answer.
        model: the unsteered model, which judges naturalness as well; none by default.
        dictionaries: folder of bilingual dictionaries in dictd's format, for translations; by
            default that of the environment variable SAESTEER_DICTIONARIES, or /usr/share/dictd.
        own: the model's own answers, whose perplexities are the range of natural ones; by default
            they are generated where the answers should be in the contents' language.

    Raises:
        UserError: a task without a check.
        UsageError: contents and answers that differ in number, an unknown task, no such folder.
    """
    task = task if isinstance(task, Task) else load_task(task)
    lm = None if model is None else as_language_model(model, device=device, dtype=dtype)
    return make_grader(task, contents, lm, dictionaries, own, progress).grade(contents, answers)


def make_grader(
    task: Task,
    contents: Sequence[str],
    lm: LanguageModel | None = None,
    dictionaries: str | Path | None = None,
    own: Sequence[str] | None = None,
    progress: Progress = no_progress,
) -> Grader:
    """A grader for answers to contents; with a model, it answers some of them for its range."""
    lang = content_language(" ".join(contents[:40]))
    grader = Grader(task, None, dictionaries, source_lang=lang)
    if lm is None:
        return grader
    if own is None:
        own = own_answers(lm, task, contents, progress=progress) if grader.lang == lang else ()
    return Grader(task, lm, dictionaries, own, source_lang=lang)
