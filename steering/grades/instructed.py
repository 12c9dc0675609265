"""A judge that needs no other model: how likely the instructed model is to give a reply.

The unsteered model reads a reply twice, after the content with the instruction and after the
content alone. What the instruction makes likelier is what it asks for: French after an instruction
to translate, and good French more than a mixture. It is a figure beside the grades, and with them
the goal of a search; it is no measure of success, since a model may be sure of what is wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import encode_prompt
from saesteer.steering.grades.log_probs import nats_after
from saesteer.steering.tasks.task import Task, compose


@dataclass(frozen=True)
class InstructedScore:
    """Log-probabilities of one reply, in nats per token; None for a reply without tokens."""

    instructed: float | None
    """After the content with the instruction."""
    plain: float | None
    """After the content alone."""

    @property
    def gain(self) -> float | None:
        """What the instruction adds; positive where it makes the reply likelier."""
        if self.instructed is None or self.plain is None:
            return None
        return self.instructed - self.plain


def instructed_scores(
    lm: LanguageModel,
    task: Task,
    contents: Sequence[str],
    replies: Sequence[str | Sequence[int]],
    *,
    wording: str | None = None,
    placement: str = "post",
) -> list[InstructedScore]:
    """Score the replies to contents, in the order given.

    Args:
        replies: texts, or the token ids that were generated.
        wording: of the instruction; by default the first evaluation wording, or else the
            instruction itself. A search on development contents gives a selection wording.
        placement: `post` or `pre`, as for `compose`.

    Raises UsageError where contents and replies differ in number, or for an unknown placement.
    """
    if len(contents) != len(replies):
        raise UsageError(
            f"`replies` has {len(replies)} entries for {len(contents)} contents; pair them up"
        )
    if placement not in ("post", "pre"):
        raise UsageError(f"`placement` must be post or pre, got {placement!r}")
    if wording is None:
        wording = next((v.text for v in task.evaluate_variants), task.instruction)
    rows = [
        list(lm.tokenizer(reply, add_special_tokens=False).input_ids)
        if isinstance(reply, str)
        else list(reply)
        for reply in replies
    ]

    def nats(texts: Sequence[str]) -> list[float | None]:
        chat = lm.has_chat_template
        heads = [encode_prompt(lm, text, chat=chat).token_ids for text in texts]
        return nats_after(lm, heads, rows)

    asked = [
        compose(content, wording, "pre" if placement == "pre" else "post") for content in contents
    ]
    return [
        InstructedScore(None if a is None else -a, None if b is None else -b)
        for a, b in zip(nats(asked), nats(list(contents)), strict=True)
    ]
