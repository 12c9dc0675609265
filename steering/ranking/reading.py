"""Latent activations of texts and replies at the positions that a ranking reads."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.activations.prompt_reader import PromptReader
from saesteer.sae.config import Progress
from saesteer.sae.model.generation import Completion, generate
from saesteer.sae.model.hooks import HookPoint
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.model.sae_places import SAEPlaces
from saesteer.sae.text.prompts import EncodedPrompt, encode_prompt
from saesteer.steering.hooking.generation import count_batches
from saesteer.steering.ranking.config import RankConfig
from saesteer.steering.tasks.task import Placement, compose

# Activations encoded at once: 64 MiB in float32, whatever the number of latents.
_ACTS_AT_ONCE = 2**24


@dataclass
class ActiveMoments:
    """Statistics of latents over the samples of one class; each tensor is `[d_sae]`, in float64."""

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
        """Add samples. Activations are never negative, so sums over all are sums over active."""
        wide = acts.double().cpu()
        self.count += len(wide)
        self.on += (wide > 0).sum(dim=0)
        self.total += wide.sum(dim=0)
        self.squares += wide.square().sum(dim=0)
        if len(wide):
            self.highest = torch.maximum(self.highest, wide.amax(dim=0))

    @property
    def rate(self) -> Tensor:
        """Share of the samples where the latent is active."""
        return self.on / max(self.count, 1)

    @property
    def mean(self) -> Tensor:
        """Mean over all samples."""
        return self.total / max(self.count, 1)

    @property
    def active_mean(self) -> Tensor:
        """Mean over the samples where the latent is active (mu)."""
        return self.total / self.on.clamp_min(1)

    @property
    def active_std(self) -> Tensor:
        """Standard deviation over the same samples (sigma)."""
        variance = self.squares / self.on.clamp_min(1) - self.active_mean.square()
        return variance.clamp_min(0).sqrt()


@dataclass
class ControlRates:
    """How often each latent is active at the tokens of plain texts, and at the others around them.

    The others are position 0, the chat template's tokens and attention sinks.
    """

    d_sae: int
    text_tokens: int = 0
    other_tokens: int = 0
    text_on: Tensor = field(init=False)
    other_on: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.text_on, self.other_on = (
            torch.zeros(self.d_sae, dtype=torch.float64) for _ in range(2)
        )

    def add(self, on: Bool[Tensor, "tokens d_sae"], other: Bool[Tensor, " tokens"]) -> None:
        """Count tokens; `other` marks those that do not belong to the text."""
        self.text_tokens += int((~other).sum())
        self.other_tokens += int(other.sum())
        self.text_on += on[~other].sum(dim=0).double().cpu()
        self.other_on += on[other].sum(dim=0).double().cpu()

    @property
    def text(self) -> Tensor:
        """Firing rate within texts."""
        return self.text_on / max(self.text_tokens, 1)

    @property
    def other(self) -> Tensor:
        """Firing rate at the template, position 0 and attention sinks."""
        return self.other_on / max(self.other_tokens, 1)


class LatentReader:
    """Reads latent activations at chosen positions of encoded texts."""

    def __init__(
        self,
        lm: LanguageModel,
        sae: SAE,
        point: HookPoint,
        config: RankConfig,
        progress: Progress,
        places: SAEPlaces | None = None,
    ) -> None:
        """`point`: where the SAE steers; `places`: where it reads, by default there."""
        self.lm = lm
        self.sae = sae
        self.point = point
        self.config = config
        self.progress = progress
        self.sinks = 0
        """Positions that would have been read and were left out as attention sinks."""
        self.control = ControlRates(sae.spec.d_sae)
        self.chat = lm.has_chat_template if config.chat is None else config.chat
        self._places = places or SAEPlaces((point,), (point,), (1.0,))
        self._residuals = PromptReader(
            lm,
            self._places.points,
            max_norm_ratio=config.max_norm_ratio,
            batch_size=config.batch_size,
        )

    def instructed(self, content: str, wording: str) -> str:
        """A content with a wording of the instruction: the text of a positive sample."""
        return compose(content, wording, cast(Placement, self.config.position))

    def encode(self, text: str) -> EncodedPrompt:
        """A text as a prompt, through the chat template where `chat` is on."""
        return encode_prompt(self.lm, text, chat=self.chat)

    def residuals(
        self, texts: Sequence[Sequence[int]], count: Callable[[int], None]
    ) -> Iterator[tuple[int, Float[Tensor, "tokens d_model"], Bool[Tensor, " tokens"]]]:
        """For each text, in any order: its number, its residuals, and which are no attention sinks.

        `count` is called after each batch with its number of texts.
        """
        for read in self._residuals.read(texts, count):
            yield read.number, self._places.input(read.rows), read.keep

    def latents(self, z: Float[Tensor, "samples d_model"]) -> Iterator[Float[Tensor, "part d_sae"]]:
        """Latent activations, in parts of bounded size."""
        for part in z.split(max(1, _ACTS_AT_ONCE // self.sae.spec.d_sae)):
            with torch.inference_mode():
                yield self.sae.encode(part)

    def pooled(self, z: Float[Tensor, "samples d_model"], how: str) -> Float[Tensor, " d_sae"]:
        """The maximum or the mean of each latent over some positions."""
        if how == "max":
            return torch.stack([part.amax(dim=0) for part in self.latents(z)]).amax(dim=0)
        parts = list(self.latents(z)) if len(z) * self.sae.spec.d_sae <= _ACTS_AT_ONCE else None
        if parts is not None:
            return torch.cat(parts).mean(dim=0)
        total = torch.zeros(self.sae.spec.d_sae, dtype=torch.float64, device=z.device)
        for part in self.latents(z):
            total += part.double().sum(dim=0)
        return (total / len(z)).to(self.sae.W_enc.dtype)

    def count_control(
        self,
        z: Float[Tensor, "tokens d_model"],
        keep: Bool[Tensor, " tokens"],
        prompt: EncodedPrompt,
    ) -> None:
        """Count where latents are active in a plain text; `z` may continue with its reply."""
        other = ~keep
        other[: len(prompt)] |= prompt.template_mask
        other[0] = True
        place = 0
        for part in self.latents(z):
            self.control.add((part > 0).cpu(), other[place : place + len(part)])
            place += len(part)


def read_texts(
    reader: LatentReader, texts: list[str], instruction: str | None, count: Callable[[int], None]
) -> Iterator[tuple[int, Float[Tensor, " d_sae"] | None]]:
    """The number of each text and its latents, pooled over the positions read; in any order.

    Attention sinks are not pooled; a text with no other position gives None.
    """
    config = reader.config
    prompts = [reader.encode(text) for text in texts]
    for i, z, keep in reader.residuals([prompt.token_ids for prompt in prompts], count):
        if instruction is None:
            reader.count_control(z, keep, prompts[i])
        start, end = _span(prompts[i], instruction, config)
        rows, kept = z[start:end], keep[start:end]
        reader.sinks += int((~kept).sum())
        yield i, reader.pooled(rows[kept], config.pool) if bool(kept.any()) else None


def _span(prompt: EncodedPrompt, instruction: str | None, config: RankConfig) -> tuple[int, int]:
    """Tokens that a sample is read at. A text without an instruction is read at its last token."""
    if config.read == "template":
        return len(prompt) - 1, len(prompt)
    last = prompt.user_span[1]
    if config.read == "last" or instruction is None:
        return last - 1, last
    length = len(instruction.strip())
    # By position and not by search, because a content may hold the same words.
    start = 0 if config.position == "pre" else len(prompt.text) - length
    return prompt.token_span(start, start + length)


def answers(
    reader: LatentReader, texts: list[str], stage: str, *, greedy: bool = False
) -> list[tuple[EncodedPrompt, Completion]]:
    """The model's replies to texts, in order."""
    config = reader.config
    prompts = [reader.encode(text) for text in texts]
    replies = generate(
        reader.lm,
        prompts,
        max_new_tokens=config.max_new_tokens,
        temperature=0.0 if greedy else config.temperature,
        top_p=config.top_p,
        seed=config.seed,
        batch_size=config.batch_size,
        progress=count_batches(
            reader.progress, stage, len(texts), config.batch_size, unit="replies"
        ),
    )
    return list(zip(prompts, replies, strict=True))
