"""How well settings steer: their answers as rows of one batch, graded and judged together."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import encode_prompt, pad_right
from saesteer.steering.evaluation.arms import Decoding, answer
from saesteer.steering.evaluation.grading import is_degenerate
from saesteer.steering.hooking.arrangement import ByRow
from saesteer.steering.hooking.generation import SteeredText
from saesteer.steering.plans.plan import Plan
from saesteer.steering.tasks.task import Task, compose

_ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Mark:
    """One answer's grades."""

    content: str
    output: str
    follows: bool
    fluent: bool
    faithful: bool | None
    """None where no program can tell."""
    log_prob: float
    """Per token, by the model that is given content and instruction; -inf for no answer."""

    @property
    def strict(self) -> bool:
        """Follows, is fluent and, where that can be told, faithful."""
        return self.follows and self.fluent and self.faithful is not False


@dataclass(frozen=True)
class Scale:
    """What the instructed model thinks of plain answers, and of its own: the ends of a scale."""

    plain: float
    own: float

    def share(self, mark: Mark) -> float:
        """Where an answer lies between plain ones (0) and the model's own (1); 0 in a loop."""
        if not mark.fluent:
            return 0.0
        width = max(self.own - self.plain, 1e-3)
        return min(1.0, max(0.0, (mark.log_prob - self.plain) / width))


@dataclass(frozen=True)
class Score:
    """The marks of one setting on some contents."""

    marks: tuple[Mark, ...]
    scale: Scale

    @property
    def value(self) -> float:
        """What is maximised: strict + follows-and-fluent / 2 + log-probability share, over 2.5.

        The second term tells settings apart while none is strict yet.
        """
        if not self.marks:
            return 0.0
        return fmean(
            (mark.strict + (mark.follows and mark.fluent) / 2 + self.scale.share(mark)) / 2.5
            for mark in self.marks
        )

    def rate(self, which: str) -> float:
        """The share of answers that have a grade; of those that can be graded, for `faithful`."""
        told = [value for mark in self.marks if (value := getattr(mark, which)) is not None]
        return fmean(told) if told else 0.0

    @property
    def log_prob_share(self) -> float:
        """Mean share of the log-probability."""
        return fmean(self.scale.share(mark) for mark in self.marks)

    def joined(self, other: "Score") -> "Score":
        """Over the contents of both."""
        return Score((*self.marks, *other.marks), self.scale)


class Scorer:
    """Answers contents under plans and marks the answers."""

    def __init__(
        self,
        lm: LanguageModel,
        task: Task,
        contents: Sequence[str],
        decoding: Decoding,
        progress: Progress = no_progress,
    ) -> None:
        self.lm, self.task, self.contents = lm, task, list(contents)
        self.decoding, self._progress = decoding, progress
        asked = [compose(content, task.instruction) for content in self.contents]
        self.unsteered = self.mark(self._answers(self.contents, None, "unsteered"), self.contents)
        self.prompted = self.mark(self._answers(asked, None, "prompted"), self.contents)
        finite = [
            [mark.log_prob for mark in marks if mark.log_prob > -1e9]
            for marks in (self.unsteered, self.prompted)
        ]
        plain, own = (fmean(values) if values else -10.0 for values in finite)
        self.scale = Scale(plain, own)

    def _answers(
        self, texts: Sequence[str], plans: Sequence[Plan] | None, stage: str
    ) -> list[SteeredText]:
        rows = None if plans is None else ByRow(plans)
        most = self.task.max_new_tokens
        return answer(self.lm, texts, rows, most, self.decoding, stage, self._progress)

    def scores(self, plans: Sequence[Plan], places: range, stage: str) -> list[Score]:
        """The scores of some plans on the same contents, all in one run of the model."""
        contents = [self.contents[i] for i in places]
        texts = contents * len(plans)
        rows = [plan for plan in plans for _ in contents]
        marks = self.mark(self._answers(texts, rows, stage), texts)
        n = len(contents)
        return [
            Score(tuple(marks[i * n : (i + 1) * n]), self.scale) for i in range(len(plans))
        ]

    def mark(self, answers: Sequence[SteeredText], contents: Sequence[str]) -> list[Mark]:
        """Grade answers to contents."""
        asked = [compose(content, self.task.instruction) for content in contents]
        log_probs = mean_log_probs(self.lm, asked, [one.token_ids for one in answers])
        return [
            Mark(
                content,
                one.completion,
                self.task.passes_loosely(one.completion, content),
                bool(one.token_ids) and not is_degenerate(one.token_ids),
                None,
                log_prob,
            )
            for one, content, log_prob in zip(answers, contents, log_probs, strict=True)
        ]


def mean_log_probs(
    lm: LanguageModel, texts: Sequence[str], replies: Sequence[Sequence[int]]
) -> list[float]:
    """Log-probability per token of each reply after its prompt, unsteered; -inf for no reply."""
    prompts = [encode_prompt(lm, text, chat=lm.has_chat_template).token_ids for text in texts]
    found = [float("-inf")] * len(prompts)
    order = sorted(
        (i for i in range(len(prompts)) if replies[i]),
        key=lambda i: -len(prompts[i]) - len(replies[i]),
    )
    for first in range(0, len(order), _ROWS_AT_ONCE):
        chunk = order[first : first + _ROWS_AT_ONCE]
        rows = [[*prompts[i], *replies[i]] for i in chunk]
        ids, mask = pad_right(lm, rows)
        with torch.inference_mode():
            h = lm.text_model(input_ids=ids, attention_mask=mask, use_cache=False)
            hidden = h.last_hidden_state
            for at, i in enumerate(chunk):
                start, end = len(prompts[i]), len(prompts[i]) + len(replies[i])
                logits = lm.unembed(hidden[at, start - 1 : end - 1]).float()
                said = torch.tensor(list(replies[i]), device=logits.device)[:, None]
                found[i] = float(torch.log_softmax(logits, dim=-1).gather(1, said).mean())
    return found
