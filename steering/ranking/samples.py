"""The samples of a ranking: texts with and without the instruction, and their statistics."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.steering.checks.catalogue import Verdict
from saesteer.steering.evaluation.thoughts import thought_tokens
from saesteer.steering.hooking.generation import counter
from saesteer.steering.ranking.detection_scores import NO_VARIANT, Texts, TextsBuilder, to_tensor
from saesteer.steering.ranking.output_scores import Contrast
from saesteer.steering.ranking.reading import (
    ActiveMoments,
    LatentReader,
    answers,
    read_texts,
)
from saesteer.steering.tasks.task import Task


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples and their statistics, after all texts have been read."""

    texts: Texts
    """The texts that are used."""
    positive: ActiveMoments
    """Over the samples with the instruction: texts, or positions where replies are read."""
    negative: ActiveMoments
    by_variant: Float[Tensor, "variants d_sae"]
    every_reply: Texts | None = None
    """The same with the replies that fail the check."""
    replies_used: tuple[int, int] | None = None

    @property
    def rate_difference(self) -> Float[Tensor, " d_sae"]:
        """Firing rate of positives minus that of negatives, divided once so that ties stay ties."""
        first, second = self.positive, self.negative
        crossed = first.on * second.count - second.on * first.count
        return crossed / max(first.count * second.count, 1)

    @property
    def mean_difference(self) -> Float[Tensor, " d_sae"]:
        """Mean activation of positives minus that of negatives."""
        return self.positive.mean - self.negative.mean

    def for_score(self, by: str) -> Texts:
        """The texts that a detection score is computed on."""
        return self.every_reply if by == "corr" and self.every_reply else self.texts


def read_prompts(reader: LatentReader, task: Task, contents: list[str]) -> Samples:
    """Samples that are prompts, read where `config.read` says; positives and negatives in pairs.

    Raises UserError when only attention sinks would be read.
    """
    d_sae, variants = reader.sae.spec.d_sae, task.select_variants
    total = len(contents) * (1 + len(variants))
    count = counter(reader.progress, "rank: read prompts", total, "samples")
    builder = TextsBuilder(d_sae)
    positive, negative = ActiveMoments(d_sae), ActiveMoments(d_sae)
    plain: dict[int, int] = {}
    for i, acts in read_texts(reader, contents, None, count):
        if acts is not None:
            plain[i] = len(plain)
            builder.add(acts, positive=False, content=i, variant=NO_VARIANT, success=False)
    paired: set[int] = set()
    for number, variant in enumerate(variants):
        texts = [reader.instructed(content, variant.text) for content in contents]
        for i, acts in read_texts(reader, texts, variant.text, count):
            if acts is None or i not in plain:
                continue
            paired.add(i)
            positive.add(acts[None])
            builder.add(acts, positive=True, content=i, variant=number, success=True)
    if not paired:
        raise UserError(
            f"`read` {reader.config.read} would read attention sinks alone: raise `max_norm_ratio` "
            f"({reader.config.max_norm_ratio:g}) or choose another `read`"
        )
    for i in sorted(paired):
        negative.add(builder.dense(plain[i])[None])
    everything = builder.build()
    texts_that_count = everything.select(np.isin(everything.content, sorted(paired)))
    by_variant = torch.zeros(len(variants), d_sae, dtype=torch.float64)
    for number in range(len(variants)):
        on_off, pairs = texts_that_count.pairs.on_off_of(number)
        by_variant[number] = to_tensor(on_off) / max(pairs, 1)
    return Samples(texts_that_count, positive, negative, by_variant)


def read_replies(reader: LatentReader, task: Task, contents: list[str]) -> Samples:
    """Samples that are positions of the model's own replies.

    Raises UsageError for a task without a check, unless all replies are used; UserError when no
    reply passes the check.
    """
    config, d_sae = reader.config, reader.sae.spec.d_sae
    if task.check_name is None and not config.all_replies:
        raise UsageError(
            f"`read` reply counts replies that pass the task's check and {task.name!r} has none: "
            "give `all_replies`, or `task` with a file that names a check"
        )
    wordings = task.select_variants[: config.reply_variants]
    instructed = [
        (number, i, reader.instructed(content, wording.text))
        for number, wording in enumerate(wordings)
        for i, content in enumerate(contents)
    ]
    answered = answers(reader, [text for *_, text in instructed], "rank: instructed replies")
    passed = [
        task.verdict(reply.text, contents[i]) is Verdict.PASS
        for (_, i, _), (_, reply) in zip(instructed, answered, strict=True)
    ]
    used = [config.all_replies or ok for ok in passed]
    if not any(used):
        raise UserError(
            f"none of {len(answered)} replies to {task.name!r} passes its check, so there is "
            f"nothing to learn from: {reader.lm.name} does not follow it; `all_replies` counts "
            "every reply"
        )
    plain = answers(reader, contents, "rank: plain replies")
    positive, negative = ActiveMoments(d_sae), ActiveMoments(d_sae)
    builder = TextsBuilder(d_sae)
    counted: list[bool] = []
    for moments, pairs, stage in (
        (positive, answered, "rank: read instructed"),
        (negative, plain, "rank: read plain"),
    ):
        rows = [prompt.token_ids + reply.token_ids for prompt, reply in pairs]
        count = counter(reader.progress, stage, len(rows), "replies")
        for i, z, keep in reader.residuals(rows, count):
            prompt, reply = pairs[i]
            # Grades leave thoughts out, so what latents do there is no evidence.
            thought = thought_tokens(reader.lm, reply.text, reply.token_ids)
            start, with_instruction = len(prompt) - 1 + thought, moments is positive
            read = keep[start:]
            if thought and thought == len(reply.token_ids):
                read = torch.zeros_like(read)  # no answer: only the last thought would be read
            counts = used[i] if with_instruction else True
            kept = z[start:][read]
            if counts:
                reader.sinks += int((~keep[start:]).sum())
                for part in reader.latents(kept):
                    moments.add(part)
            if not with_instruction:
                reader.count_control(z, keep, prompt)
            if not len(kept):
                continue
            number, content = instructed[i][:2] if with_instruction else (NO_VARIANT, i)
            if with_instruction:
                ok = passed[i]
            else:
                ok = task.verdict(reply.text, contents[i]) is Verdict.PASS
            counted.append(counts)
            builder.add(
                reader.pooled(kept, "mean"),
                positive=with_instruction,
                content=content,
                variant=number,
                success=ok,
            )
    everything = builder.build()
    return Samples(
        everything.select(np.array(counted, bool)),
        positive,
        negative,
        torch.zeros(0, d_sae, dtype=torch.float64),
        everything,
        (sum(used), len(answered)),
    )


def contrasts(reader: LatentReader, task: Task, contents: list[str]) -> list[Contrast]:
    """Greedy answers to some contents with and without the instruction, for the gradients.

    Contents whose instructed answer fails the check are left out, as are those where either answer
    is empty or both are the same. Raises UserError when nothing is left.
    """
    config = reader.config
    sample = contents[: config.effect_contents]
    asked = [reader.instructed(content, task.instruction) for content in sample]
    followed = answers(reader, asked, "rank: answers to instructions", greedy=True)
    plain = answers(reader, sample, "rank: answers to contents alone", greedy=True)
    judged = task.check_name is not None and not config.all_replies
    found = []
    for i, ((_, good), (prompt, other)) in enumerate(zip(followed, plain, strict=True)):
        if judged and task.verdict(good.text, sample[i]) is not Verdict.PASS:
            continue
        if good.token_ids and other.token_ids and good.token_ids != other.token_ids:
            found.append(Contrast(i, prompt.token_ids, good.token_ids, other.token_ids))
    if not found:
        raise UserError(
            f"none of {len(sample)} answers to {task.name!r} follows it and is not the plain "
            "one, so there is no effect to measure: raise `effect_contents`, or give `all_replies` "
            "to take answers that fail the check"
        )
    return found
