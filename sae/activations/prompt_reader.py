"""Prompts through a language model: their residuals at hook points, and which rows are sinks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saesteer.checkpoints.errors import NonFiniteError
from saesteer.checkpoints.places import Place
from saesteer.sae.activations.sinks import MAX_NORM_RATIO, NotFinite, SinkFilter
from saesteer.sae.model.forward_pass import ForwardPass
from saesteer.sae.model.hooks import HookPoint
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import pad_right


@dataclass(frozen=True, eq=False)
class PromptRows:
    """The residuals of one prompt."""

    number: int
    """Which of the prompts this is."""
    rows: dict[Place, Float[Tensor, "tokens d_model"]]
    """By `HookPoint.key`, in float32, where the model computed them."""
    keep: Bool[Tensor, " tokens"]
    """False for attention sinks; on the CPU."""


class PromptReader:
    """Reads prompts at some hook points. All that one reader reads is judged as one sequence of
    contexts (see `SinkFilter`)."""

    def __init__(
        self,
        lm: LanguageModel,
        points: Sequence[HookPoint],
        *,
        max_norm_ratio: float = MAX_NORM_RATIO,
        batch_size: int = 16,
    ) -> None:
        self.lm = lm
        self.points = list(points)
        self.batch_size = batch_size
        self.sinks = SinkFilter(max_norm_ratio)

    def read(
        self,
        prompts: Sequence[Sequence[int]],
        count: Callable[[int], None] = lambda prompts: None,
    ) -> Iterator[PromptRows]:
        """The residuals of each prompt, given as token ids. The longest come first: `SinkFilter`
        says why.

        `count` is called after each batch with the number of its prompts.

        Raises NonFiniteError when the model gives NaN or infinity.
        """
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for first in range(0, len(order), self.batch_size):
            chunk = order[first : first + self.batch_size]
            ids, mask = pad_right(self.lm, [prompts[i] for i in chunk])
            with torch.inference_mode():
                inputs = {"input_ids": ids, "attention_mask": mask}
                forward = ForwardPass.begin(self.lm, self.points, inputs)
                keep = self.keep(forward.norms(), ids, mask)
            for at, number in enumerate(chunk):
                tokens = len(prompts[number])
                rows = {place: h[at, :tokens].float() for place, h in forward.seen.items()}
                yield PromptRows(number, rows, keep[at, :tokens])
            count(len(chunk))

    def keep(
        self,
        norms: Float[Tensor, "places prompts seq"],
        token_ids: Int[Tensor, "prompts seq"],
        mask: Int[Tensor, "prompts seq"],
    ) -> Bool[Tensor, "prompts seq"]:
        """False for attention sinks and padding, on the CPU. `norms` are lengths of residuals, also
        on the CPU; ids and attention mask are as `pad_right` gives them.

        Raises NonFiniteError.
        """
        text, ids = mask.bool().cpu(), token_ids.cpu()
        usual = text & ~torch.isin(ids, self.lm.special_ids)
        usual[:, :1] = False  # see SinkFilter
        places = [point.key for point in self.points]
        try:
            return self.sinks.keep_contexts(norms, text, places, usual=usual)
        except NotFinite as error:
            raise NonFiniteError(
                f"{self.lm.name} gave NaN or infinite activations at layer {error.place[0]}: try "
                "`dtype` float32"
            ) from None
