"""A slow reference of the steering hook: one row, no padding, no cache, listed positions."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import EncodedPrompt, encode_prompt, pad_left
from saesteer.steering.hooking.hook import steer
from saesteer.steering.plans.from_sae import make_plan
from saesteer.steering.plans.plan import Plan, PlannedLatent

from .whole_row import CLOSE, LAYER, STEPS, moved

IDS = (3, 7, 11)

INSTRUCTION = "Use a list"

TEXTS = (
    f"The statement assigns a value to a name. {INSTRUCTION}",
    f"yield it. {INSTRUCTION} please",
    f"Modules are objects and so are the functions in them {INSTRUCTION}",
)

Edit = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def edited_at(
    lm: LanguageModel, layer: int, edit: Edit, positions: Sequence[int]
) -> Iterator[None]:
    """Replace the output of one block at listed positions of a single, whole, unpadded row."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        h = output if isinstance(output, Tensor) else output[0]
        assert h.shape[0] == 1
        new = h.clone()
        for p in positions:
            if p < h.shape[1]:
                new[0, p] = edit(h[0, p].float()).to(h.dtype)
        return new if isinstance(output, Tensor) else (new, *output[1:])

    handle = lm.blocks[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def logits_of(lm: LanguageModel, tokens: Sequence[int]) -> Tensor:
    """Logits `[tokens, vocab]` of a row run alone, without a cache."""
    with torch.no_grad():
        ids = torch.tensor([list(tokens)])
        return lm.model(input_ids=ids, use_cache=False).logits[0].float()


def reference_logits(
    lm: LanguageModel, tokens: Sequence[int], edit: Edit, positions: Sequence[int]
) -> Tensor:
    with edited_at(lm, LAYER, edit, positions):
        return logits_of(lm, tokens)


def reference_greedy(
    lm: LanguageModel,
    prompt: Sequence[int],
    edit: Edit,
    positions: Callable[[list[int]], Sequence[int]],
    steps: int = STEPS,
) -> tuple[list[int], Tensor]:
    """New tokens, and the logits that chose each: everything is computed again at each step."""
    tokens, scores = list(prompt), []
    for _ in range(steps):
        scores.append(reference_logits(lm, tokens, edit, positions(tokens))[-1])
        tokens.append(int(scores[-1].argmax()))
    return tokens[len(prompt) :], torch.stack(scores)


def reference_edit(sae: SAE, plan: Plan) -> Edit:
    """The edit of one residual vector, written out latent by latent."""
    return lambda h: h + moved(plan, sae, h, sae.encode(h[None])[0], 1.0)


def positions_of(
    scope: str, prompt: EncodedPrompt, tokens: Sequence[int], special: set[int]
) -> list[int]:
    """The positions that a scope covers, one at a time, from the words of its definition."""
    P, n = len(prompt), len(tokens)
    text_tokens = [
        i
        for i, (a, b) in enumerate(prompt.offsets)
        if a < prompt.text_start + len(prompt.text) and b > prompt.text_start
    ]
    found = []
    for p in range(n):
        kept = p > 0 and tokens[p] not in special and (p >= P or p in text_tokens)
        end = prompt.text.index(INSTRUCTION) + len(INSTRUCTION) + prompt.text_start
        covered = {
            "generation": p >= P - 1,
            "generated": p >= P,
            "prompt": p < P and kept,
            "all": kept,
            "last-prompt": p == P - 1,
            "first:3": P - 1 <= p < P + 2,
            "span:4-12": p < P
            and prompt.offsets[p][0] < prompt.text_start + 12
            and prompt.offsets[p][1] > prompt.text_start + 4,
            "after-instruction": p >= P - 1 or prompt.offsets[p][0] >= end,
        }[scope]
        if covered:
            found.append(p)
    return found


def ranked_plan(lm: LanguageModel, sae: SAE, **fields: Any) -> Plan:
    latents = [
        PlannedLatent(id=j, score=0.9, mu=1.5 + 0.5 * i, sigma=0.4, max=4.0)
        for i, j in enumerate(IDS)
    ]
    return make_plan(lm, sae, latents, **fields)


def prompts_of(lm: LanguageModel, chat: bool = True) -> list[EncodedPrompt]:
    return [encode_prompt(lm, text, chat=chat) for text in TEXTS]


def generate(
    lm: LanguageModel, prompts: Sequence[EncodedPrompt], **options: Any
) -> tuple[Tensor, Tensor]:
    """New tokens `[rows, new]` and their logits `[rows, new, vocab]`, left-padded, greedy."""
    ids, mask = pad_left(lm, [prompt.token_ids for prompt in prompts])
    settings = {"max_new_tokens": STEPS, "do_sample": False, **options}
    output = lm.model.generate(
        input_ids=ids,
        attention_mask=mask,
        pad_token_id=lm.pad_id,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    return output.sequences[:, ids.shape[1] :], torch.stack(output.logits, dim=1).float()


def check_against_reference(
    lm: LanguageModel,
    sae: SAE,
    plan: Plan,
    prompts: Sequence[EncodedPrompt],
    scope: str = "generation",
    steer_options: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Batched generation inside `steer` equals the reference in tokens, logits and positions."""
    with steer(lm, plan, scope=scope, prompts=prompts, **(steer_options or {})) as report:
        tokens, logits = generate(lm, prompts, **options)
    special = set(lm.special_ids.tolist())
    edit = reference_edit(sae, plan)
    for i, prompt in enumerate(prompts):
        new, scores = reference_greedy(
            lm,
            prompt.token_ids,
            edit,
            lambda row, prompt=prompt: positions_of(scope, prompt, row, special),
        )
        assert tokens[i].tolist() == new
        torch.testing.assert_close(logits[i], scores, **CLOSE)
        # The last new token is never run.
        ran = [*prompt.token_ids, *new[:-1]]
        row = report.call_rows(0)[i]
        assert row.positions.tolist() == positions_of(scope, prompt, ran, special)
        assert row.prompt_length == len(prompt)
    assert report.tokens_touched == sum(len(row.positions) for row in report.rows)


def hooks_on(lm: LanguageModel) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lm.model.modules()
    )
