"""Damage of a plan on neutral questions: how far it moves the model, and which answers it loses.

The unsteered model answers the questions once, greedily. Each plan is measured on those answers
with teacher forcing, and its own answers are compared with the right ones.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.places import Place
from saesteer.sae.activations.prompt_reader import PromptReader
from saesteer.sae.activations.sinks import norms_of
from saesteer.sae.model.generation import generate
from saesteer.sae.model.hooks import HookPoint, hooked, resolve_site
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import EncodedPrompt, encode_prompt, pad_right
from saesteer.steering.checks.words import occurrences, without_thinking
from saesteer.steering.hooking.hook import TouchedRow, steer
from saesteer.steering.plans.plan import Plan
from saesteer.steering.tasks.task import BUILTIN_FOLDER

NEUTRAL_FILE = BUILTIN_FOLDER / "neutral.jsonl"

_ROWS_AT_ONCE = 8
# The unsteered log-probabilities are kept between plans up to this many numbers.
_NUMBERS_KEPT = 2**27


@dataclass(frozen=True)
class Question:
    """A question unrelated to any instruction, and the answers that count as right."""

    prompt: str
    answers: tuple[str, ...]

    def is_right(self, reply: str) -> bool:
        """Whether a right answer occurs as whole words, whatever its case."""
        return occurrences(without_thinking(reply), self.answers) > 0


def neutral_questions() -> list[Question]:
    """The built-in neutral questions: short facts that small models know some of."""
    lines = NEUTRAL_FILE.read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line.strip()]
    return [Question(row["prompt"], tuple(row["answers"])) for row in rows]


@dataclass(frozen=True)
class Damage:
    """Damage of a plan. Values in nats are per answer token; answers have equal weight."""

    kl: float
    """KL(plain || steered)."""
    kl_reverse: float
    """KL(steered || plain)."""
    top1_agreement: float
    """Share of positions where both models' most likely next token is the same."""
    delta_ce: float
    """Rise of the cross-entropy of the unsteered model's own answers."""
    relative_dose: float | None
    """Median ||delta|| / ||h|| over the edited positions."""
    norm_ratio: float | None
    """Median norm of the edited residuals divided by their median norm without the edit."""
    outside_norms: float | None
    """Share of edited residuals whose norm is outside the middle 98 % of unedited norms."""
    right_before: int | None = None
    """Questions that the unsteered model answers right; None where flips were not counted."""
    right_to_wrong: int | None = None
    wrong_to_right: int | None = None
    questions: int = 0

    @property
    def leaves_norm_range(self) -> bool:
        """Whether most edited residuals have a norm outside the middle 98 % of unedited ones."""
        return (self.outside_norms or 0.0) > 0.5

    def row(self) -> dict[str, Any]:
        """Every field and derived value, JSON-ready."""
        flips = None
        if self.right_to_wrong is not None and self.wrong_to_right is not None:
            total = self.right_to_wrong + self.wrong_to_right
            flips = self.right_to_wrong / total if total else None
        return {
            **asdict(self),
            "side_effect_ratio": flips,
            "leaves_norm_range": self.leaves_norm_range,
        }


class NeutralProbe:
    """Measures plans on neutral questions; the unsteered model is run only once.

    Args:
        questions: by default the built-in ones.
        max_new_tokens: length of the unsteered answers that plans are measured on.
    """

    def __init__(
        self,
        lm: LanguageModel,
        questions: Sequence[Question] | None = None,
        *,
        max_new_tokens: int = 24,
    ) -> None:
        self.lm = lm
        self.questions = list(neutral_questions() if questions is None else questions)
        if not self.questions:
            raise UserError("damage is measured on neutral questions and there are none")
        self.max_new_tokens = max_new_tokens
        self._prompts = [
            encode_prompt(lm, question.prompt, chat=lm.has_chat_template)
            for question in self.questions
        ]
        self._replies: list[list[int]] | None = None
        self._texts: list[str] = []
        self._plain: dict[int, Tensor] = {}
        self._plain_norms: dict[tuple[int, Place], Tensor] = {}

    def measure(self, plan: Plan, *, flips: bool = False) -> Damage:
        """The damage of a plan; with `flips`, answers that turn right or wrong are counted too.

        Raises UserError for a scope without a position in some question, such as
        `after-instruction`.
        """
        lm = self.lm
        # Norms are compared after the last edit.
        deepest = max(plan.parts, key=lambda part: part.layer)
        point = resolve_site(lm, deepest.layer, deepest.site)
        columns: list[list[float]] = [[], [], [], []]
        usual_norms: list[Tensor] = []
        edited_norms: list[Tensor] = []
        reports: list[TouchedRow] = []
        reader = PromptReader(lm, [point])
        for chunk, rows, prompts in self._chunks():
            norms_before: list[Tensor] = []
            plain = self._plain_log_probs(chunk[0], rows, prompts, point, norms_before)
            with steer(lm, plan, prompts=prompts) as report, _norms(point) as after:
                steered = self._log_probs(rows, prompts)
            before = norms_before[0]
            # Attention sinks, a hundred times longer than the rest, would make any norm look usual.
            usual_norms.append(before[reader.keep(before[None], *pad_right(lm, rows))])
            for place, touched in enumerate(report.rows):
                at = touched.positions
                # The last pass: plans that need one make a plain pass before it.
                edited_norms.append(after[-1][place, at])
                reports.append(touched)
            for p, q, row, prompt in zip(plain, steered, rows, prompts, strict=True):
                answer_ids = torch.tensor(row[len(prompt) :], device=q.device)[:, None]
                columns[0].append(float((p.exp() * (p - q)).sum(1).mean()))
                columns[1].append(float((q.exp() * (q - p)).sum(1).mean()))
                columns[2].append(float((p.argmax(1) == q.argmax(1)).float().mean()))
                columns[3].append(float((p.gather(1, answer_ids) - q.gather(1, answer_ids)).mean()))
        kl, reverse, agreement, rise = (sum(column) / len(column) for column in columns)
        dose, ratio, outside = _norm_figures(usual_norms, edited_norms, reports)
        counted = self._flips(plan) if flips else {}
        return Damage(kl, reverse, agreement, rise, dose, ratio, outside, **counted)

    def _flips(self, plan: Plan) -> dict[str, Any]:
        with steer(self.lm, plan, prompts=self._prompts):
            replies = self._generate()
        before = [q.is_right(text) for q, text in zip(self.questions, self._texts, strict=True)]
        after = [q.is_right(r.text) for q, r in zip(self.questions, replies, strict=True)]
        return {
            "right_before": sum(before),
            "right_to_wrong": sum(b and not a for b, a in zip(before, after, strict=True)),
            "wrong_to_right": sum(a and not b for b, a in zip(before, after, strict=True)),
            "questions": len(self.questions),
        }

    def _generate(self) -> Any:
        return generate(self.lm, self._prompts, max_new_tokens=self.max_new_tokens, batch_size=32)

    def _answer(self) -> list[list[int]]:
        """The unsteered model's greedy answers, as token ids."""
        if self._replies is None:
            replies = self._generate()
            self._replies = [reply.token_ids for reply in replies]
            self._texts = [reply.text for reply in replies]
        return self._replies

    def _chunks(self) -> Iterator[tuple[list[int], list[list[int]], list[EncodedPrompt]]]:
        """Indices, prompt and answer tokens, and prompts of a few questions at a time.

        Questions that the unsteered model answers with nothing are left out: there is no token
        to measure on.
        """
        replies = self._answer()
        order = [i for i in range(len(replies)) if replies[i]]
        if not order:
            raise UserError(
                f"{self.lm.name} answers every neutral question with nothing, so damage cannot be "
                "measured on its answers"
            )
        # The longest first, as in PromptReader.
        order.sort(key=lambda i: -len(self._prompts[i]) - len(replies[i]))
        for first in range(0, len(order), _ROWS_AT_ONCE):
            chunk = order[first : first + _ROWS_AT_ONCE]
            rows = [[*self._prompts[i].token_ids, *replies[i]] for i in chunk]
            yield chunk, rows, [self._prompts[i] for i in chunk]

    def _plain_log_probs(
        self,
        key: int,
        rows: list[list[int]],
        prompts: list[EncodedPrompt],
        point: HookPoint,
        norms: list[Tensor],
    ) -> list[Float[Tensor, "tokens vocabulary"]]:
        """Unsteered log-probabilities; the norms at the hook point are appended to `norms`."""
        place = (key, point.key)
        if key in self._plain and place in self._plain_norms:
            norms.append(self._plain_norms[place])
            lengths = [len(row) - len(p) for row, p in zip(rows, prompts, strict=True)]
            return list(self._plain[key].split(lengths))
        with _norms(point) as seen:
            found = self._log_probs(rows, prompts)
        norms.append(seen[0])
        joined = torch.cat(found)
        if joined.numel() * len(self.questions) / len(rows) <= _NUMBERS_KEPT:
            self._plain[key], self._plain_norms[place] = joined, seen[0]
        return found

    def _log_probs(
        self, rows: list[list[int]], prompts: list[EncodedPrompt]
    ) -> list[Float[Tensor, "tokens vocabulary"]]:
        """For each row, log-probabilities at the positions that predict its answer's tokens."""
        ids, mask = pad_right(self.lm, rows)
        with torch.inference_mode():
            logits = self.lm.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return [
                torch.log_softmax(row[len(prompt) - 1 : len(tokens) - 1].float(), dim=-1)
                for row, prompt, tokens in zip(logits, prompts, rows, strict=True)
            ]


@contextlib.contextmanager
def _norms(point: HookPoint) -> Iterator[list[Tensor]]:
    """Collect the norms of the activations at a hook point, after the edits registered so far."""
    seen: list[Tensor] = []

    def read(h: Float[Tensor, "batch seq d_model"]) -> None:
        seen.append(norms_of({point.key: h.detach()})[0].cpu())

    with hooked(point, read):
        yield seen


def _norm_figures(
    usual: list[Tensor], edited: list[Tensor], reports: list[TouchedRow]
) -> tuple[float | None, float | None, float | None]:
    """Median relative dose, ratio of median lengths, share outside the unedited middle 98 %."""
    after = torch.cat(edited).double().numpy()
    if not after.size:
        return None, None, None
    low, high = np.percentile(torch.cat(usual).double().numpy(), [1, 99])
    outside = float(((after < low) | (after > high)).mean())
    before = torch.cat([row.residual_norms for row in reports]).double().numpy()
    dose = float(np.median(torch.cat([row.relative_doses for row in reports]).double().numpy()))
    return dose, float(np.median(after) / np.median(before)), outside
