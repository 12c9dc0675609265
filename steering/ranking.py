"""Which latents carry an instruction: one streamed pass over contrastive samples."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saesteer.checkpoints.errors import NonFiniteError, UsageError, UserError
from saesteer.checkpoints.sae_file import SAE, load_sae
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.generation import Completion, generate
from saesteer.sae.hooks import HookPoint, run_to, sae_hook_point
from saesteer.sae.models import LanguageModel, as_language_model
from saesteer.sae.prompts import EncodedPrompt, encode_prompt, pad_right
from saesteer.steering.checks import Verdict
from saesteer.steering.plan import Plan, PlannedLatent, TaskIdentity, make_plan
from saesteer.steering.tasks import Placement, Task, compose, load_task

READS = ("last", "template", "span", "reply")
"""last token of the user's text; last prompt token; instruction tokens; the model's own reply."""

SCORES = ("saif", "rate", "meandiff")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankConfig:
    """How samples are made, where they are read, and what ranks the latents."""

    by: str | None = None
    """`saif`, `rate` or `meandiff`; by default saif, or rate when replies are read."""
    read: str = "last"
    """Where a sample is read: one of `READS`."""
    position: str = "post"
    """The instruction after the content (`post`, the paper's better choice) or before (`pre`)."""
    pool: str = "max"
    """`max` or `mean` over the tokens of a span."""
    contents: int = 48
    """Contents of the train split to use."""
    reply_variants: int = 2
    """Wordings that the model answers when replies are read; every selection wording otherwise."""
    all_replies: bool = False
    """Count instructed replies that fail the task's check too."""
    max_new_tokens: int = 40
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    batch_size: int = 32
    max_norm_ratio: float = 10.0
    chat: bool | None = None
    """Send samples through the chat template; by default when there is one."""

    def __post_init__(self) -> None:
        for flag, value, allowed in (
            ("--read", self.read, READS),
            ("--by", self.resolved_by, SCORES),
            ("--position", self.position, ("post", "pre")),
            ("--pool", self.pool, ("max", "mean")),
        ):
            if value not in allowed:
                raise UsageError(f"{flag} must be one of {', '.join(allowed)}, got {value!r}")
        if self.read == "reply" and self.resolved_by == "saif":
            raise UsageError(
                "--by saif compares single positions and --read reply reads many: "
                "use --by rate or meandiff"
            )
        for flag, count in (
            ("--rank-contents", self.contents),
            ("--reply-variants", self.reply_variants),
            ("--max-new-tokens", self.max_new_tokens),
            ("--batch-size", self.batch_size),
        ):
            if count < 1:
                raise UsageError(f"{flag} must be at least 1, got {count}")
        if not self.max_norm_ratio > 1:
            raise UsageError(f"--max-norm-ratio must be above 1, got {self.max_norm_ratio}")

    @property
    def resolved_by(self) -> str:
        return self.by or ("rate" if self.read == "reply" else "saif")


@dataclass(frozen=True, eq=False)
class Ranking:
    """Scores of every latent for one task, each `[d_sae]` float64.

    `mu` and `sigma` are over the positive samples where the latent is active, `highest` is the
    largest activation seen there. `by_variant` holds the sensitivity for each wording alone, in the
    order of `task.select_variants`; it is empty when replies were read.
    """

    task: Task
    config: RankConfig
    point: HookPoint
    score: Float[Tensor, " d_sae"]
    rate_positive: Float[Tensor, " d_sae"]
    rate_negative: Float[Tensor, " d_sae"]
    mean_difference: Float[Tensor, " d_sae"]
    mu: Float[Tensor, " d_sae"]
    sigma: Float[Tensor, " d_sae"]
    highest: Float[Tensor, " d_sae"]
    positives: int
    negatives: int
    by_variant: Float[Tensor, "variants d_sae"]
    replies_used: tuple[int, int] | None = None
    """Instructed replies that passed the check, and all of them."""
    excluded: dict[str, int] = field(default_factory=lambda: {"sinks": 0})
    """Positions that would have been read and were left out, by reason."""

    def top(self, k: int) -> list[int]:
        """The best k latents: by score, ties by mu, then by number.

        Raises UserError when no latent scores above zero.
        """
        order = torch.argsort(self.mu, descending=True, stable=True)
        order = order[torch.argsort(self.score[order], descending=True, stable=True)]
        ids = [int(i) for i in order[:k] if self.score[i] > 0]
        if not ids:
            raise UserError(
                f"no latent tells {self.task.name} apart at layer {self.point.layer}: the SAE may "
                "never have seen the behaviour (train with --replies), or try another --read"
            )
        return ids

    def explain(self, latent: int) -> dict[str, Any]:
        """Every column for one latent."""
        row: dict[str, Any] = {
            "id": latent,
            "score": float(self.score[latent]),
            "rate_positive": float(self.rate_positive[latent]),
            "rate_negative": float(self.rate_negative[latent]),
            "mean_difference": float(self.mean_difference[latent]),
            "mu": float(self.mu[latent]),
            "sigma": float(self.sigma[latent]),
            "max": float(self.highest[latent]),
        }
        if len(self.by_variant):
            column = self.by_variant[:, latent]
            row["variant_min"] = float(column.min())
            row["variant_std"] = float(column.std(correction=0))
        return row


def rank(
    model: str | LanguageModel,
    sae: str | SAE,
    task: str | Path | Task,
    config: RankConfig = RankConfig(),
    *,
    layer: int | None = None,
    site: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    progress: Progress = no_progress,
) -> Ranking:
    """Score every latent of an SAE for one instruction.

    Positive samples are train contents with a selection wording of the instruction, negative ones
    the contents alone. With on(x) = [a_j(z(x)) > 0] over N pairs (SAIF, arXiv 2502.11356):

    - `saif`: C_j = (1/N) sum on(x+) (1 - on(x-));
    - `rate`: share of positives minus share of negatives where the latent is on;
    - `meandiff`: mean activation over positives minus over negatives.

    With `read="span"` a positive sample is read at the tokens of the instruction and a negative one
    at its last token. With `read="reply"` the model answers both kinds of text; samples are then
    the last prompt token and every reply token, and only instructed replies that pass the task's
    check count.

    Attention sinks are left out everywhere. A text that is read at sinks alone is no sample, and
    neither is the other one of its pair: a content that is in no pair any more counts nowhere.

    Args:
        model: a name, folder or `.gguf` file, or a loaded `LanguageModel`.
        sae: a folder or `RELEASE:ID`, or a loaded `SAE`.
        task: a built-in name, a `task.yaml`, or a `Task`. Its dev and test contents and its
            evaluation wordings are never read.
        layer: where the SAE does not say what it reads; `site` likewise.
        force: let an SAE of other weights pass.

    Raises:
        UserError: SAE and model do not fit, the task has no train contents, no reply passes, only
            attention sinks would be read.
        UsageError: a layer or site that contradicts the SAE.
        NonFiniteError: the model's activations are NaN or infinite.
    """
    lm = as_language_model(model, device=device, dtype=dtype)
    sae = (sae if isinstance(sae, SAE) else load_sae(sae)).to(lm.device)
    point = sae_hook_point(sae, lm, layer=layer, site=site, force=force)
    task = task if isinstance(task, Task) else load_task(task)
    contents = list(task.contents.get("train", ()))[: config.contents]
    if not contents:
        raise UserError(f"task {task.name!r} has no contents in its train split to rank with")
    reader = _Reader(lm, sae, point, config, progress)
    if config.read == "reply":
        return _rank_replies(reader, task, contents)
    return _rank_prompts(reader, task, contents)


@dataclass
class _Moments:
    """Sums over the samples of one class, `[d_sae]` each, in float64."""

    d_sae: int
    count: int = 0
    on: Tensor = field(init=False)
    total: Tensor = field(init=False)
    squares: Tensor = field(init=False)
    highest: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.on, self.total, self.squares, self.highest = (
            torch.zeros(self.d_sae, dtype=torch.float64) for _ in range(4)
        )

    def add(self, acts: Float[Tensor, "samples d_sae"]) -> None:
        """Add samples; activations are never negative, so sums over all are sums over active."""
        wide = acts.double().cpu()
        self.count += len(wide)
        self.on += (wide > 0).sum(dim=0)
        self.total += wide.sum(dim=0)
        self.squares += wide.square().sum(dim=0)
        if len(wide):
            self.highest = torch.maximum(self.highest, wide.amax(dim=0))

    @property
    def rate(self) -> Tensor:
        return self.on / max(self.count, 1)

    @property
    def mean(self) -> Tensor:
        return self.total / max(self.count, 1)

    @property
    def active_mean(self) -> Tensor:
        return self.total / self.on.clamp_min(1)

    @property
    def active_std(self) -> Tensor:
        variance = self.squares / self.on.clamp_min(1) - self.active_mean.square()
        return variance.clamp_min(0).sqrt()


def _counter(progress: Progress, stage: str, total: int, unit: str) -> Callable[[int], None]:
    """Start a stage; the function returned adds to what is done of it, up to the total."""
    done = 0
    progress(stage, 0, total, unit)

    def add(count: int) -> None:
        nonlocal done
        done = min(done + count, total)
        progress(stage, done, total, unit)

    return add


class _Reader:
    """Reads latent activations at chosen positions of encoded texts."""

    def __init__(
        self,
        lm: LanguageModel,
        sae: SAE,
        point: HookPoint,
        config: RankConfig,
        progress: Progress,
    ) -> None:
        self.lm = lm
        self.sae = sae
        self.point = point
        self.config = config
        self.progress = progress
        self.sinks = 0
        self.chat = lm.has_chat_template if config.chat is None else config.chat

    def instructed(self, content: str, wording: str) -> str:
        """A positive sample."""
        return compose(content, wording, cast(Placement, self.config.position))

    def encode(self, text: str) -> EncodedPrompt:
        return encode_prompt(self.lm, text, chat=self.chat)

    def residuals(
        self, rows: Sequence[Sequence[int]], count: Callable[[int], None]
    ) -> Iterator[tuple[int, Float[Tensor, "tokens d_model"], Bool[Tensor, " tokens"]]]:
        """For each text: its number, its residuals, and which rows are no attention sinks.

        `count` is called with the number of texts of each batch when it has been read.
        """
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        size = self.config.batch_size
        for first in range(0, len(order), size):
            chunk = order[first : first + size]
            ids, mask = pad_right(self.lm, [rows[i] for i in chunk])
            with torch.inference_mode():
                h = run_to(self.lm, [self.point], input_ids=ids, attention_mask=mask)
            values = h[self.point.key].float()
            norms = values.norm(dim=-1)
            real = norms[mask.bool()]
            if not bool(torch.isfinite(real).all()):
                raise NonFiniteError(
                    f"{self.lm.name} gave NaN or infinite activations at layer "
                    f"{self.point.layer}: try --dtype float32"
                )
            median = real.median()
            near = norms <= self.config.max_norm_ratio * median
            for place, i in enumerate(chunk):
                length = len(rows[i])
                yield i, values[place, :length], near[place, :length]
            count(len(chunk))

    def without_sinks(
        self, z: Float[Tensor, "tokens d_model"], near: Bool[Tensor, " tokens"]
    ) -> Float[Tensor, "kept d_model"]:
        """The rows that are no attention sinks; the others are counted."""
        self.sinks += int((~near).sum())
        return z[near]

    def latents(self, z: Float[Tensor, "samples d_model"]) -> Float[Tensor, "samples d_sae"]:
        with torch.inference_mode():
            return self.sae.encode(z)


def _rank_prompts(reader: _Reader, task: Task, contents: list[str]) -> Ranking:
    """Samples read at one position each, positives and negatives in pairs."""
    config, d_sae = reader.config, reader.sae.spec.d_sae
    variants = task.select_variants
    samples = len(contents) * (1 + len(variants))
    count = _counter(reader.progress, "rank: read prompts", samples, "samples")
    plain, plain_kept = _read_samples(reader, contents, None, count)
    plain_on = plain > 0
    positive, negative = _Moments(d_sae), _Moments(d_sae)
    paired = torch.zeros(len(contents), dtype=torch.bool)
    pairs = torch.zeros(len(variants), 1, dtype=torch.float64)
    # Whole numbers, divided once at the end: latents that tie have the very same score.
    on_off = torch.zeros(len(variants), d_sae, dtype=torch.float64)
    for number, variant in enumerate(variants):
        texts = [reader.instructed(content, variant.text) for content in contents]
        acts, kept = _read_samples(reader, texts, variant.text, count)
        kept = kept & plain_kept
        paired |= kept
        pairs[number] = kept.sum()
        positive.add(acts[kept])
        on_off[number] = ((acts > 0) & ~plain_on)[kept].sum(dim=0)
    negative.add(plain[paired])
    if not positive.count:
        raise UserError(
            f"--read {config.read} would read attention sinks alone: raise --max-norm-ratio "
            f"({config.max_norm_ratio:g}) or choose another --read"
        )
    score = {
        "saif": on_off.sum(dim=0) / positive.count,
        "rate": _rate_difference(positive, negative),
        "meandiff": positive.mean - negative.mean,
    }[config.resolved_by]
    return _ranking(reader, task, score, positive, negative, on_off / pairs.clamp_min(1))


def _rate_difference(positive: _Moments, negative: _Moments) -> Float[Tensor, " d_sae"]:
    """Firing rate of the positives minus that of the negatives, rounded once, so that ties hold."""
    crossed = positive.on * negative.count - negative.on * positive.count
    return crossed / max(positive.count * negative.count, 1)


def _read_samples(
    reader: _Reader, texts: list[str], instruction: str | None, count: Callable[[int], None]
) -> tuple[Float[Tensor, "samples d_sae"], Bool[Tensor, " samples"]]:
    """Latents of each text at the read position, in order, on the CPU, and which texts count.

    Attention sinks are left out of what is pooled; a text with nothing left does not count.
    """
    config = reader.config
    prompts = [reader.encode(text) for text in texts]
    pooled = torch.zeros(len(texts), reader.sae.spec.d_sae, dtype=reader.sae.W_enc.dtype)
    kept = torch.zeros(len(texts), dtype=torch.bool)
    for i, z, near in reader.residuals([prompt.token_ids for prompt in prompts], count):
        start, end = _span(prompts[i], instruction, config)
        rows = reader.without_sinks(z[start:end], near[start:end])
        if not len(rows):
            continue
        acts = reader.latents(rows)
        pooled[i] = (acts.amax(dim=0) if config.pool == "max" else acts.mean(dim=0)).cpu()
        kept[i] = True
    return pooled, kept


def _span(prompt: EncodedPrompt, instruction: str | None, config: RankConfig) -> tuple[int, int]:
    """Tokens that a sample is read at. A text without an instruction is read at its last token."""
    if config.read == "template":
        return len(prompt) - 1, len(prompt)
    last = prompt.user_span[1]
    if config.read == "last" or instruction is None:
        return last - 1, last
    length = len(instruction.strip())
    # By its place and not by search: a content may hold the words of the instruction too.
    start = 0 if config.position == "pre" else len(prompt.text) - length
    return prompt.token_span(start, start + length)


def _rank_replies(reader: _Reader, task: Task, contents: list[str]) -> Ranking:
    """Samples are the positions of replies that the model itself gives."""
    config, d_sae = reader.config, reader.sae.spec.d_sae
    if task.check_name is None and not config.all_replies:
        raise UsageError(
            f"--read reply counts replies that pass the task's check and {task.name!r} has none: "
            "give --all-replies, or --task with a file that names a check"
        )
    wordings = task.select_variants[: config.reply_variants]
    instructed = [
        (content, reader.instructed(content, wording.text))
        for wording in wordings
        for content in contents
    ]
    answered = _answer(reader, [text for _, text in instructed], "rank: instructed replies")
    passing = [
        pair
        for (content, _), pair in zip(instructed, answered, strict=True)
        if config.all_replies or task.verdict(pair[1].text, content) is Verdict.PASS
    ]
    if not passing:
        raise UserError(
            f"none of {len(answered)} replies to {task.name!r} passes its check, so there is "
            f"nothing to learn from: {reader.lm.name} does not follow it; --all-replies counts "
            "every reply"
        )
    plain = _answer(reader, contents, "rank: plain replies")
    positive, negative = _Moments(d_sae), _Moments(d_sae)
    for moments, pairs, stage in (
        (positive, passing, "rank: read instructed"),
        (negative, plain, "rank: read plain"),
    ):
        rows = [prompt.token_ids + reply.token_ids for prompt, reply in pairs]
        count = _counter(reader.progress, stage, len(rows), "replies")
        for i, z, near in reader.residuals(rows, count):
            start = len(pairs[i][0]) - 1
            moments.add(reader.latents(reader.without_sinks(z[start:], near[start:])))
    score = {
        "rate": _rate_difference(positive, negative),
        "meandiff": positive.mean - negative.mean,
    }[config.resolved_by]
    no_variants = torch.zeros(0, d_sae, dtype=torch.float64)
    ranking = _ranking(reader, task, score, positive, negative, no_variants)
    return replace(ranking, replies_used=(len(passing), len(answered)))


def _answer(
    reader: _Reader, texts: list[str], stage: str
) -> list[tuple[EncodedPrompt, Completion]]:
    """The model's replies to texts, in order."""
    config = reader.config
    prompts = [reader.encode(text) for text in texts]
    count = _counter(reader.progress, stage, len(texts), "replies")
    replies = generate(
        reader.lm,
        prompts,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
        batch_size=config.batch_size,
        progress=lambda new_tokens: count(config.batch_size),
    )
    return list(zip(prompts, replies, strict=True))


def _ranking(
    reader: _Reader,
    task: Task,
    score: Tensor,
    positive: _Moments,
    negative: _Moments,
    by_variant: Tensor,
) -> Ranking:
    return Ranking(
        task=task,
        config=reader.config,
        point=reader.point,
        score=score,
        rate_positive=positive.rate,
        rate_negative=negative.rate,
        mean_difference=positive.mean - negative.mean,
        mu=positive.active_mean,
        sigma=positive.active_std,
        highest=positive.highest,
        positives=positive.count,
        negatives=negative.count,
        by_variant=by_variant,
        excluded={"sinks": reader.sinks},
    )


def lens_tokens(lm: LanguageModel, direction: Float[Tensor, " d_model"], k: int = 6) -> list[str]:
    """The tokens whose logits a direction raises most: the top of W_U norm(d) (logit lens)."""
    with torch.inference_mode():
        weight = next(lm.unembed.parameters())
        d = direction.to(weight.device, weight.dtype)[None]
        # Length matters to a norm's epsilon only; a typical residual length keeps that negligible.
        d = d * (math.sqrt(d.shape[1]) / d.float().norm().clamp_min(1e-12)).to(d.dtype)
        logits = lm.unembed(lm.final_norm(d) if lm.final_norm is not None else d)[0]
        # Padded vocabularies have rows behind the last token; nothing ever trained those.
        logits = logits[: len(lm.tokenizer)].float()
        return [lm.tokenizer.decode([i]) for i in logits.topk(k).indices.tolist()]


def plan_from_ranking(
    lm: LanguageModel,
    sae: SAE,
    ranking: Ranking,
    *,
    top: int = 15,
    method: str = "add",
    unit: str = "raw",
    scale: float = 1.0,
    beta: float = 0.0,
    scope: str = "generation",
) -> Plan:
    """A steering plan of the best `top` latents, with their statistics and lens tokens."""
    if top < 1:
        raise UsageError(f"--top must be at least 1, got {top}")
    latents = [
        PlannedLatent(
            id=i,
            score=float(ranking.score[i]),
            mu=float(ranking.mu[i]),
            sigma=float(ranking.sigma[i]),
            max=float(ranking.highest[i]),
            lens=tuple(lens_tokens(lm, sae.W_dec[i])),
        )
        for i in ranking.top(top)
    ]
    return make_plan(
        lm,
        sae,
        latents,
        layer=ranking.point.layer,
        site=ranking.point.site,
        method=method,
        unit=unit,
        scale=scale,
        beta=beta,
        scope=scope,
        task=TaskIdentity(ranking.task.name, ranking.task.hash, ranking.task.wordings),
        metrics={
            "by": ranking.config.resolved_by,
            "read": ranking.config.read,
            "position": ranking.config.position,
            "positives": ranking.positives,
            "negatives": ranking.negatives,
            "replies_used": list(ranking.replies_used) if ranking.replies_used else None,
        },
    )
