"""The unsteered model's own answers: what natural text of a task looks like to it."""

from collections.abc import Sequence

from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.hooking.generation import count_batches, generate_steered
from saesteer.steering.tasks.task import Task, compose

MOST_CONTENTS = 24
"""Contents that are answered, with the instruction and without."""


def own_answers(
    lm: LanguageModel,
    task: Task,
    contents: Sequence[str],
    *,
    batch_size: int = 64,
    progress: Progress = no_progress,
) -> list[str]:
    """Greedy answers to the first contents, with an evaluation wording and without any."""
    asked = list(dict.fromkeys(contents))[:MOST_CONTENTS]
    wording = next((v.text for v in task.evaluate_variants), task.instruction)
    texts = [*(compose(content, wording) for content in asked), *asked]
    made = generate_steered(
        lm,
        texts,
        None,
        max_new_tokens=task.max_new_tokens,
        batch_size=batch_size,
        progress=count_batches(progress, "the model's own answers", len(texts), batch_size),
    )
    return [one.completion for one in made]
