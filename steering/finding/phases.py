"""What an instruction does to the model: at the prompt's tail and at replies, in every layer.

All layers are read in one streamed pass over prompts and the model's own replies; sums are kept and
no activations.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.model_files import cache_folder
from saesteer.sae.activations.prompt_reader import PromptReader
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.generation import Completion, generate
from saesteer.sae.model.hooks import resolve_site
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import EncodedPrompt, encode_prompt
from saesteer.sae.text.replies import keep_finished, read_finished
from saesteer.steering.hooking.generation import count_batches, counter
from saesteer.steering.tasks.task import Task, compose

MAX_TAIL = 32
"""At most this many of a tail's last tokens are read: some templates end with whole sentences."""


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """What is read."""

    contents: int = 48
    """Train contents."""
    wordings: int = 4
    """Wordings of the instruction, for the tail."""
    reply_wordings: int = 2
    """Wordings that are answered, for the replies."""
    max_new_tokens: int = 40
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    batch_size: int = 64


@dataclass(frozen=True, eq=False)
class Phases:
    """Mean residuals with the instruction minus those without it, after every block."""

    scope: str
    """The scope of the prompt's part: `tail`, or `last-prompt` without a chat template."""
    tail: Float[Tensor, "layers places d_model"]
    """At the last tokens of the prompt, the last place at its last token."""
    replies: Float[Tensor, "layers d_model"]
    """At reply tokens, of instructed replies that follow against plain ones."""
    norms: Float[Tensor, " layers"]
    """Mean length of the plain residual at reply tokens."""
    last: Float[Tensor, "layers contents d_model"]
    """Plain residuals at the last token of each content's prompt."""
    replies_used: tuple[int, int]
    """Instructed replies that follow, and all of them."""


def random_phases(phases: Phases, seed: int = 0) -> Phases:
    """Random directions in place of what was read, of the same lengths: a control."""
    draw = torch.Generator().manual_seed(seed)

    def like(rows: Tensor) -> Tensor:
        noise = torch.randn(rows.shape, generator=draw)
        lengths: Tensor = rows.norm(dim=-1, keepdim=True)
        found: Tensor = noise / noise.norm(dim=-1, keepdim=True) * lengths
        return found

    return replace(phases, tail=like(phases.tail), replies=like(phases.replies))


def read_phases(
    lm: LanguageModel,
    task: Task,
    config: ReadConfig = ReadConfig(),
    *,
    progress: Progress = no_progress,
) -> Phases:
    """Read both phases at every layer, over train contents and wordings for selection.

    Replies are sampled once and kept in the cache folder, batch by batch, so that a run that was
    cut short goes on where it stopped. Where no instructed reply follows, all of them count.

    Raises UserError for a task without train contents, or when all replies are empty.
    """
    contents = list(task.contents.get("train", ()))[: config.contents]
    if not contents:
        raise UserError(f"task {task.name!r} has no train contents to read the model on")
    wordings = [variant.text for variant in task.select_variants[: config.wordings]]
    answered = wordings[: config.reply_wordings]
    chat = lm.has_chat_template

    def encoded(texts: Sequence[str]) -> list[EncodedPrompt]:
        return [encode_prompt(lm, text, chat=chat) for text in texts]

    plain = encoded(contents)
    asked = [encoded([compose(content, wording) for content in contents]) for wording in wordings]
    to_answer = [prompt for prompts in asked[: len(answered)] for prompt in prompts] + plain
    replies = sampled(lm, to_answer, config, progress)
    instructed, alone = replies[: -len(plain)], replies[-len(plain) :]
    sources = contents * len(answered)
    graded = task.check_name is not None
    follows = [
        bool(reply.token_ids) and (not graded or task.passes_loosely(reply.text, source))
        for reply, source in zip(instructed, sources, strict=True)
    ]
    counts = follows if any(follows) else [bool(reply.token_ids) for reply in instructed]
    if not any(counts) or not any(reply.token_ids for reply in alone):
        raise UserError(f"{lm.name} answers every content of {task.name!r} with nothing")

    rows: list[list[int]] = []
    passages: list[_Passage] = []
    for number, prompts in enumerate([*asked, plain]):
        for i, prompt in enumerate(prompts):
            with_instruction = number < len(asked)
            reply: Completion | None = alone[i] if not with_instruction else None
            if number < len(answered) and counts[number * len(contents) + i]:
                reply = instructed[number * len(contents) + i]
            said = [] if reply is None else reply.token_ids
            rows.append([*prompt.token_ids, *said])
            content = None if with_instruction else i
            passages.append(_Passage(len(prompt), with_instruction, content))
    places = _places(to_answer) if chat else 1
    sums = _Sums(lm, places, len(contents))
    reader = PromptReader(lm, sums.points)
    count = counter(progress, "read every layer", len(rows), "texts")
    for read in reader.read(rows, count):
        stacked = torch.stack([read.rows[point.key] for point in sums.points])
        sums.add(stacked.cpu(), read.keep, passages[read.number])
    return sums.phases("tail" if chat else "last-prompt", (sum(follows), len(follows)))


def _places(prompts: Sequence[EncodedPrompt]) -> int:
    """Tokens after the user's text that every prompt has."""
    places = min(len(prompt) - prompt.user_span[1] for prompt in prompts)
    # A template that writes nothing there leaves the last token.
    return max(1, min(places, MAX_TAIL))


@dataclass(frozen=True)
class _Passage:
    """What a row that is read holds."""

    prompt_length: int
    instructed: bool
    content: int | None
    """Which content it is, for plain rows."""


class _Sums:
    """Sums over tokens, in float64."""

    def __init__(self, lm: LanguageModel, places: int, contents: int) -> None:
        self.points = [resolve_site(lm, layer) for layer in range(lm.n_layers)]
        shape = lm.n_layers, places, lm.d_model
        self._tail = torch.zeros(2, *shape, dtype=torch.float64)
        self._replies = torch.zeros(2, lm.n_layers, lm.d_model, dtype=torch.float64)
        self._norms = torch.zeros(lm.n_layers, dtype=torch.float64)
        self._prompts, self._tokens = [0, 0], [0, 0]
        self._last = torch.zeros(lm.n_layers, contents, lm.d_model)

    def add(
        self,
        rows: Float[Tensor, "layers tokens d_model"],
        keep: Tensor,
        passage: _Passage,
    ) -> None:
        """Add the residuals of one prompt and its reply."""
        kind, end = int(passage.instructed), passage.prompt_length
        places = self._tail.shape[2]
        self._tail[kind] += rows[:, end - places : end]
        self._prompts[kind] += 1
        said = rows[:, end:][:, keep[end:]]
        self._replies[kind] += said.sum(dim=1)
        self._tokens[kind] += said.shape[1]
        if passage.content is not None:
            self._norms += said.norm(dim=-1).sum(dim=1)
            self._last[:, passage.content] = rows[:, end - 1]

    def phases(self, scope: str, used: tuple[int, int]) -> Phases:
        tail = self._tail[1] / self._prompts[1] - self._tail[0] / self._prompts[0]
        counts = [max(tokens, 1) for tokens in self._tokens]
        replies = self._replies[1] / counts[1] - self._replies[0] / counts[0]
        norms = (self._norms / counts[0]).float()
        return Phases(scope, tail.float(), replies.float(), norms, self._last, used)


def sampled(
    lm: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    config: ReadConfig,
    progress: Progress = no_progress,
) -> list[Completion]:
    """Replies to prompts, from the cache folder where they were made before with these settings."""
    settings = [
        lm.fingerprint, config.max_new_tokens, config.temperature, config.top_p, config.seed,
        config.batch_size, [prompt.token_ids for prompt in prompts],
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    part = cache_folder() / "replies" / f"{key}.part"
    return generate(
        lm,
        prompts,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
        batch_size=config.batch_size,
        progress=count_batches(progress, "sample replies", len(prompts), config.batch_size),
        finished=read_finished(part, len(prompts)),
        after_batch=lambda made: keep_finished(part, made),
    )
