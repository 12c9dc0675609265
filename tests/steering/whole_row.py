"""A slow reference of steering with a plan: one whole unpadded row, no cache, token by token.

It is written from the definitions and uses no code of the hook. `check` runs `generate` in some way
under `steer` and compares the scores of every sequence it returns with this reference.
"""

import contextlib
import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.model.hooks import hooked, resolve_site
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import EncodedPrompt, encode_prompt, pad_left
from saesteer.steering.hooking.gates import Above, Every, Gate, Node, Not
from saesteer.steering.hooking.hook import steer
from saesteer.steering.plans.from_sae import make_plan
from saesteer.steering.plans.plan import Plan, PlannedLatent

LAYER, STEPS = 1, 5
INSTRUCTION = "Use it"
TEXTS = (
    f"The statement assigns a value to a name. {INSTRUCTION}",
    f"yield it. {INSTRUCTION} now",
    f"Modules are objects and so are {INSTRUCTION}",
)
# The same sums in another order, through four blocks in float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

Rule = Callable[[Tensor, int], Tensor]
"""From a row's residuals `[tokens, d_model]` (float32) and P to what is added at each token."""


# ---------------------------------------------------------------------------------------------
# models, SAEs, plans


def make_sae(
    lm: LanguageModel,
    architecture: str = "standard",
    *,
    seed: int = 0,
    layer: int = LAYER,
    **fields: Any,
) -> SAE:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    d_model, d_sae = lm.d_model, 24
    return SAE(
        spec=SAESpec(
            architecture=architecture,  # type: ignore[arg-type]
            d_model=d_model,
            d_sae=d_sae,
            k=6 if architecture == "topk" else None,
            hook_name=f"blocks.{layer}.hook_resid_post",
            **fields,
        ),
        W_enc=noise(d_model, d_sae) / d_model**0.5,
        b_enc=noise(d_sae) * 0.3,
        W_dec=noise(d_sae, d_model) / d_model**0.5,
        b_dec=noise(d_model) * 0.3,
        threshold=noise(d_sae).abs() * 0.3 if architecture == "jumprelu" else None,
        source="somewhere",
        sha256=f"{architecture}{seed}",
    )


def plan_of(lm: LanguageModel, sae: SAE, *ids: int, **fields: Any) -> Plan:
    latents = [
        PlannedLatent(id=i, mu=1.5 + 0.5 * n, sigma=0.4, max=4.0)
        for n, i in enumerate(ids or (3, 7))
    ]
    return make_plan(lm, sae, latents, **fields)


def prompts_of(lm: LanguageModel) -> list[EncodedPrompt]:
    return [encode_prompt(lm, text, chat=True) for text in TEXTS]


# ---------------------------------------------------------------------------------------------
# the reference


def reference(
    lm: LanguageModel, tokens: Sequence[int], P: int, rules: Sequence[Rule | tuple[int, Rule]]
) -> Tensor:
    """Logits of one whole unpadded row without a cache, with each rule's difference added.

    A rule acts at `LAYER`, or at the layer that comes with it.
    """
    at = [rule if isinstance(rule, tuple) else (LAYER, rule) for rule in rules]

    def edit(layer: int) -> Callable[[Tensor], Tensor]:
        def edited(h: Tensor) -> Tensor:
            for rule in [rule for where, rule in at if where == layer]:
                h = (h.float() + rule(h[0].float(), P)[None]).to(h.dtype)
            return h

        return edited

    ids = torch.tensor([list(tokens)])
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for layer in {where for where, _ in at}:
            stack.enter_context(hooked(resolve_site(lm, layer), edit(layer)))
        logits: Tensor = lm.model(input_ids=ids, use_cache=False).logits
    return logits[0].float()


def covered(scope: str, prompt: EncodedPrompt, tokens: Sequence[int], special: set[int]) -> Any:
    """Whether a scope covers each position, from the words of its definition."""
    P, start = len(prompt), prompt.text_start

    def inside(p: int) -> bool:
        a, b = prompt.offsets[p]
        return a < start + len(prompt.text) and b > start

    def one(p: int) -> bool:
        kept = p > 0 and tokens[p] not in special and (p >= P or inside(p))
        end = start + prompt.text.index(INSTRUCTION) + len(INSTRUCTION)
        match scope.partition(":")[0]:
            case "generation" | "assistant":
                return p >= P - 1
            case "generated" | "replies":
                return p >= P
            case "tail":
                return p < P and prompt.offsets[p][0] >= start + len(prompt.text)
            case "prompt":
                return p < P and kept
            case "all":
                return kept
            case "last-prompt":
                return p == P - 1
            case "first":
                return P - 1 <= p < P - 1 + int(scope.partition(":")[2])
            case "span":
                first, _, last = scope.partition(":")[2].partition("-")
                a, b = prompt.offsets[p] if p < P else (0, 0)
                return p < P and a < start + int(last) and b > start + int(first)
        assert scope == "after-instruction"
        return p >= P - 1 or prompt.offsets[p][0] >= end

    return [one(p) for p in range(len(tokens))]


def weight(schedule: str, g: int) -> float:
    kind, _, numbers = schedule.partition(":")
    values = [float(n) for n in numbers.split(",") if n and "=" not in n]
    return {
        "constant": lambda: 1.0,
        "first": lambda: float(g < values[0]),
        "linear": lambda: max(0.0, 1 - g / values[0]),
        "decay": lambda: (1 + values[0] * g) ** -values[1],
        "steps": lambda: stage(numbers, g),
    }[kind]()


def stage(numbers: str, g: int) -> float:
    pairs = [pair.split("=") for pair in numbers.split(",")]
    return [float(share) for start, share in pairs if int(start) <= g][-1]


def memory(acts: Sequence[float], on: float, off: float) -> list[bool]:
    """A latent's state after each token: on above `on`, off again at `off`."""
    state, found = False, []
    for value in acts:
        state = value > on or (state and value > off)
        found.append(state)
    return found


def opened(gate: Gate, acts: Tensor, P: int, on_prompt: Sequence[bool]) -> list[bool]:
    """Whether a gate is open at each token; `on_prompt` are the tokens that may decide it once."""

    def states(node: Node) -> list[bool]:
        if isinstance(node, Above):
            return memory(acts[:, node.latent].tolist(), node.on, node.off)
        if isinstance(node, Not):
            return [not state for state in states(node.part)]
        join = all if isinstance(node, Every) else any
        return [join(now) for now in zip(*map(states, node.parts), strict=True)]

    found = states(gate.root)
    if not gate.on_prompt:
        return found
    decided = any(on and may for on, may in zip(found, on_prompt[: len(found)], strict=True))
    return [decided and p >= P - 1 for p in range(len(acts))]


def rule_of(
    lm: LanguageModel, plan: Plan, sae: SAE, prompt: EncodedPrompt, tokens: Sequence[int]
) -> Rule:
    """The edits of a plan, for one row."""
    special = set(lm.special_ids.tolist())
    where = covered(plan.scope, prompt, tokens, special)
    on_prompt = covered("prompt", prompt, tokens, special)
    if plan.when is not None:
        last = plain(lm, plan.when.layer, prompt.token_ids)[-1]
        if float(last.double() @ plan.when.weight.double()) + plan.when.bias <= 0:
            where = [False] * len(tokens)
    unsteered = plain(lm, plan.layer, prompt.token_ids) if plan.method == "set-to" else None
    last_covered = max([p for p, yes in enumerate(where) if yes], default=-1)

    def rule(h: Tensor, P: int) -> Tensor:
        acts = sae.encode(h)
        gate = opened(plan.parsed_gate, acts, P, on_prompt) if plan.gate else [True] * len(h)
        delta = torch.zeros_like(h)
        for p in range(len(h)):
            if where[p] and gate[p]:
                share = weight(plan.schedule, max(0, p - (P - 1)))
                shares = None
                if plan.by_place is not None:
                    place = p - last_covered - 1  # -1 at the last token that is covered
                    if -place > len(plan.by_place):
                        continue
                    shares = plan.by_place[place]
                before = None if unsteered is None else unsteered[p]
                delta[p] = moved(plan, sae, h[p], acts[p], share, shares, before)
        return delta

    return rule


def plain(lm: LanguageModel, layer: int, tokens: Sequence[int]) -> Tensor:
    """Residuals of the unsteered model after a block, one row by itself."""
    seen: list[Tensor] = []

    def keep(h: Tensor) -> None:
        seen.append(h[0].float())

    with torch.no_grad(), hooked(resolve_site(lm, layer), keep):
        lm.model(input_ids=torch.tensor([list(tokens)]), use_cache=False)
    return seen[0]


def moved(
    plan: Plan,
    sae: SAE,
    h: Tensor,
    acts: Tensor,
    share: float,
    by_place: Tensor | None = None,
    unsteered: Tensor | None = None,
) -> Tensor:
    """What one edit adds to one residual vector, latent by latent.

    `by_place` are the latents' shares at this token; `unsteered` is the plain residual there.
    """
    rows = sae.W_dec[list(plan.ids)]
    if plan.method == "project":
        basis = torch.linalg.qr(rows.T).Q.T
        return -share * sum(((h @ d) * d for d in basis), torch.zeros_like(h))
    total = torch.zeros_like(h)
    shares = [1.0] * len(plan.ids) if by_place is None else by_place.tolist()
    for j, whole, portion in zip(plan.ids, plan.doses(), shares, strict=True):
        a, dose = acts[j], whole * portion
        change = {
            "add": dose,
            "set-to": dose,
            "add-keep-norm": dose,
            "set": dose - a,
            "min": max(a, torch.tensor(dose)) - a,
            "max": min(a, torch.tensor(dose)) - a,
            "scale": dose * a - a,
            "ablate": -a,
        }[plan.method]
        total = total + change * sae.W_dec[j]
    if plan.unit == "rel":
        total = total / total.norm() * plan.scale * h.norm()
    if unsteered is not None:
        total = unsteered + total - h
    total = share * total
    if plan.method == "add-keep-norm":
        total = (h + total) / (h + total).norm() * h.norm() - h
    return total


# ---------------------------------------------------------------------------------------------
# ways to run generate


class RecordingStreamer(BaseStreamer):  # type: ignore[misc]
    """A streamer that records its input: the prompt, then the new token of every row."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.parts.append(value.clone())

    def end(self) -> None:
        self.ended = True


RUNS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 5},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "sampled, static": {"do_sample": True, "cache_implementation": "static"},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams, no cache": {"num_beams": 3, "use_cache": False},
    "beams, static": {"num_beams": 3, "cache_implementation": "static"},
    "beams, sampled": {"num_beams": 3, "do_sample": True},
    "streamer": {"streamer": RecordingStreamer},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "assistant": {"assistant_model": None},
    "assistant, sampled": {"assistant_model": None, "do_sample": True},
    "early exit": {"assistant_early_exit": 2},
}
"""Arguments of `generate`; the last four are for one row at a time."""

ONE_ROW = ("prompt lookup", "assistant", "assistant, sampled", "early exit")


def options_of(lm: LanguageModel, run: str) -> dict[str, Any]:
    options = {"do_sample": False, "max_new_tokens": STEPS, **RUNS[run]}
    if "assistant_model" in options:
        # The model itself, unsteered: some of its drafts are right under steering and some wrong.
        options["assistant_model"] = copy.deepcopy(lm.model)
    if "streamer" in options:
        options["streamer"] = RecordingStreamer()
    return options


def check(
    lm: LanguageModel,
    plans: Any,
    rules: Callable[[int, list[int]], Sequence[Rule | tuple[int, Rule]]],
    run: str,
    close: dict[str, float] = CLOSE,
    **more: Any,
) -> Any:
    """Every sequence that `generate` returns is scored by the reference as it was inside.

    `rules` are those of a prompt's number and a row's tokens.
    """
    prompts = prompts_of(lm)
    options = options_of(lm, run)
    factor = options.get("num_return_sequences", 1)
    batches = [[i] for i in range(len(prompts))] if run in ONE_ROW else [[*range(len(prompts))]]
    torch.manual_seed(0)
    with steer(lm, plans, prompts=prompts, **more) as report:
        outputs = [generate(lm, [prompts[i] for i in batch], **options) for batch in batches]
    for batch, output in zip(batches, outputs, strict=True):
        width = output.sequences.shape[1] - STEPS
        for row, sequence in enumerate(output.sequences[:, width:].tolist()):
            number = batch[row // factor]
            tokens = [*prompts[number].token_ids, *sequence]
            P = len(prompts[number])
            logits = reference(lm, tokens, P, rules(number, tokens))[P - 1 : -1]
            if "num_beams" in options:
                chosen = logits.log_softmax(-1).gather(1, torch.tensor(sequence)[:, None])
                found = output.sequences_scores[row].float()
                torch.testing.assert_close(found, chosen.sum() / STEPS, **close)
            else:
                found = torch.stack(output.logits, dim=1)[row].float()
                torch.testing.assert_close(found, logits, **close)
                if not options["do_sample"] and close is CLOSE:
                    assert logits.argmax(-1).tolist() == sequence
    if run == "streamer":
        heard = options["streamer"]
        assert heard.ended
        told = torch.stack(heard.parts[1:], dim=1)
        assert torch.equal(told, outputs[0].sequences[:, -STEPS:])
    return report


def generate(lm: LanguageModel, prompts: Sequence[EncodedPrompt], **options: Any) -> Any:
    ids, mask = pad_left(lm, [prompt.token_ids for prompt in prompts])
    return lm.model.generate(
        input_ids=ids,
        attention_mask=mask,
        pad_token_id=lm.pad_id,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
