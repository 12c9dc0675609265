"""Batched generation: left-padded, seeded, in input order."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.config import check_sampling
from saesteer.sae.model.kept_replies import kept_replies
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.model.nucleus import Nucleus
from saesteer.sae.text.prompts import EncodedPrompt, pad_left


@dataclass(frozen=True)
class Completion:
    """New tokens of one prompt, end-of-text and padding removed, and their text."""

    text: str
    token_ids: list[int]


def generate(
    lm: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    before_batch: Callable[[Sequence[int]], None] | None = None,
    progress: Callable[[int], None] | None = None,
    finished: Mapping[int, Completion] | None = None,
    after_batch: Callable[[Mapping[int, Completion]], None] | None = None,
) -> list[Completion]:
    """Generate a completion for each prompt, in the order given.

    Prompts are batched by length so that little is spent on padding. Temperature 0 is greedy.
    Sampling is seeded per batch and leaves the global random state alone.

    Args:
        before_batch: called with the indices of the prompts of the batch about to run.
        progress: called with the number of new tokens of the batch that ended.
        finished: completions of an earlier call that was cut short, by the place of their prompt;
            batches that are all there are not run again. The rest comes out as it would have.
        after_batch: called with the completions of each batch that was run, by place.

    Raises:
        UsageError: a sampling parameter out of range.

    Inside `keep_replies` a batch that was answered before is not run again.
    """
    from saesteer.checkpoints.model_files import quiet

    check_sampling(temperature, top_p, batch_size, max_new_tokens)
    longest = max((len(prompt) for prompt in prompts), default=0)
    positions = lm.positions
    if positions is not None and longest + max_new_tokens > positions:
        raise UsageError(
            f"`max_new_tokens` {max_new_tokens} after a prompt of {longest} tokens is more than "
            f"the {positions} positions of {lm.name}: at most {max(0, positions - longest)} fit"
        )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions: list[Completion | None] = [None] * len(prompts)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        # top_k 0 switches off the library's hidden default of 50; both others happen in `Nucleus`.
        sampling = dict(do_sample=True, temperature=1.0, top_p=1.0, top_k=0)
        sampling["logits_processor"] = [Nucleus(temperature, top_p)]
    devices = [lm.device] if lm.device.type == "cuda" else []
    limits = {"new": max_new_tokens, "temperature": temperature, "top_p": top_p}
    kept = kept_replies(lm, limits)
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        if finished is not None and all(i in finished for i in rows):
            for i in rows:
                completions[i] = finished[i]
            if progress is not None:
                progress(sum(len(finished[i].token_ids) for i in rows))
            continue
        ids, mask = pad_left(lm, [prompts[i].token_ids for i in rows])
        if before_batch is not None:
            before_batch(rows)
        asked = [prompts[i].token_ids for i in rows]
        new = None if kept is None else kept.get(asked, seed + first)
        if new is None:
            with torch.inference_mode(), torch.random.fork_rng(devices), quiet():
                torch.manual_seed(seed + first)
                output = lm.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=lm.pad_id,
                    **sampling,
                )
            new = output[:, ids.shape[1] :].tolist()
            if kept is not None:
                kept.put(asked, seed + first, new)
        batch = [_finish(lm, row) for row in new]
        for i, completion in zip(rows, batch, strict=True):
            completions[i] = completion
        if after_batch is not None:
            after_batch(dict(zip(rows, batch, strict=True)))
        if progress is not None:
            progress(sum(len(completion.token_ids) for completion in batch))
    return [c for c in completions if c is not None]


def stop_ids(lm: LanguageModel) -> set[int]:
    """Token ids that end a completion."""
    stops = lm.model.generation_config.eos_token_id
    if stops is None:
        stops = lm.tokenizer.eos_token_id
    if stops is None:
        return set()
    return {stops} if isinstance(stops, int) else set(stops)


def _finish(lm: LanguageModel, row: list[int]) -> Completion:
    """A row of generated ids, cut at the first one that ends a completion."""
    stops = stop_ids(lm)
    end = next((i for i, token in enumerate(row) if token in stops), len(row))
    return Completion(lm.tokenizer.decode(row[:end], skip_special_tokens=True).strip(), row[:end])
