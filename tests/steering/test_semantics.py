"""Schedules, gates, several plans and plans by row, against the whole row computed again."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.hooks import capture, hooked, resolve_site
from saesteer.sae.models import LanguageModel, wrap_model
from saesteer.sae.prompts import EncodedPrompt, encode_prompt, pad_left
from saesteer.steering.arrangement import ByRow
from saesteer.steering.chats import encode_chat
from saesteer.steering.hook import steer
from saesteer.steering.latent_reading import with_gate
from saesteer.steering.plan import Plan, PlannedLatent, make_plan

LAYER, STEPS = 1, 5
TEXTS = ("The statement assigns a value to a name.", "yield it", "Modules are objects and so are")
# The same sums in another order, through four blocks in float32.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}

Rule = Callable[[Tensor, int], Tensor]
"""From a row's residuals `[tokens, d_model]` and P to what is added at each token."""


def make_sae(lm: LanguageModel, architecture: str = "standard") -> SAE:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return SAE(
        spec=SAESpec(
            architecture=architecture,  # type: ignore[arg-type]
            d_model=32,
            d_sae=24,
            k=6 if architecture == "topk" else None,
            hook_name=f"blocks.{LAYER}.hook_resid_post",
        ),  # fmt: skip
        W_enc=noise(32, 24) / 32**0.5,
        b_enc=noise(24) * 0.3,
        W_dec=noise(24, 32) / 32**0.5,
        b_dec=noise(32) * 0.3,
        source="somewhere",
        sha256=architecture,
    )


def plan_of(lm: LanguageModel, sae: SAE, *ids: int, **fields: Any) -> Plan:
    latents = [
        PlannedLatent(id=i, mu=1.5 + 0.5 * n, sigma=0.4) for n, i in enumerate(ids or (3, 7))
    ]
    return make_plan(lm, sae, latents, **fields)


@pytest.fixture
def lm(tiny_lm: Callable[..., tuple[Any, Any]]) -> LanguageModel:
    model, tokenizer = tiny_lm("llama")
    model.generation_config.eos_token_id = None
    return wrap_model(model, tokenizer, "tiny")


def prompts_of(lm: LanguageModel) -> list[EncodedPrompt]:
    return [encode_prompt(lm, text, chat=True) for text in TEXTS]


def reference(lm: LanguageModel, tokens: Sequence[int], P: int, rules: Sequence[Rule]) -> Tensor:
    """Logits of one whole unpadded row without a cache, with each rule's difference added."""

    def edit(h: Tensor) -> Tensor:
        for rule in rules:
            h = h + rule(h[0], P)[None]
        return h

    with torch.no_grad(), hooked(resolve_site(lm, LAYER), edit):
        logits: Tensor = lm.model(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits
    return logits[0]


RUNS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 5},
    "sampled": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams, no cache": {"num_beams": 3, "use_cache": False},
}


def check(
    lm: LanguageModel, plans: Any, rules: Callable[[int], Sequence[Rule]], run: str, **more: Any
) -> Any:
    """Every sequence that `generate` returns is scored by the reference as it was inside."""
    prompts = prompts_of(lm)
    ids, mask = pad_left(lm, [prompt.token_ids for prompt in prompts])
    options = {"do_sample": False, "max_new_tokens": STEPS, **RUNS[run]}
    torch.manual_seed(0)
    with steer(lm, plans, prompts=prompts, **more) as report:
        output = lm.model.generate(
            input_ids=ids, attention_mask=mask, pad_token_id=lm.pad_id, output_scores=True,
            output_logits=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
    factor = options.get("num_return_sequences", 1)
    for i, sequence in enumerate(output.sequences[:, ids.shape[1] :].tolist()):
        prompt = prompts[i // factor]
        P = len(prompt)
        logits = reference(lm, [*prompt.token_ids, *sequence], P, rules(i // factor))[P - 1 : -1]
        if "num_beams" in options:
            chosen = logits.log_softmax(-1).gather(1, torch.tensor(sequence)[:, None])
            torch.testing.assert_close(output.sequences_scores[i], chosen.sum() / STEPS, **CLOSE)
        else:
            torch.testing.assert_close(
                torch.stack(output.logits, dim=1)[i].float(), logits, **CLOSE
            )
    return report


def vector(plan: Plan) -> Tensor:
    return torch.tensor(plan.doses()) @ plan.directions


def weight(schedule: str, g: int) -> float:
    kind, _, numbers = schedule.partition(":")
    values = [float(number) for number in numbers.split(",") if number]
    return {
        "constant": lambda: 1.0,
        "first": lambda: float(g < values[0]),
        "linear": lambda: max(0.0, 1 - g / values[0]),
        "decay": lambda: (1 + values[0] * g) ** -values[1],
    }[kind]()


@pytest.mark.parametrize("run", ["greedy", "no cache", "chunked prefill", "beams"])
@pytest.mark.parametrize("schedule", ["first:2", "linear:4", "decay:0.5,3"])
@pytest.mark.parametrize("method", ["add", "add-keep-norm", "set"])
def test_schedules_weigh_each_position(
    method: str, schedule: str, run: str, lm: LanguageModel
) -> None:
    sae = make_sae(lm)
    plan = plan_of(lm, sae, method=method, schedule=schedule)

    def rule(h: Tensor, P: int) -> Tensor:
        delta = torch.zeros_like(h)
        for p in range(P - 1, len(h)):
            w = weight(schedule, p - (P - 1))
            if method == "set":
                acts = sae.encode(h[p])
                new = acts.clone()
                new[list(plan.ids)] = torch.tensor(plan.doses())
                delta[p] = w * (sae.decode(new) - sae.decode(acts))
            else:
                delta[p] = w * vector(plan)
                if method == "add-keep-norm":
                    moved = h[p] + delta[p]
                    delta[p] = moved * h[p].norm() / moved.norm() - h[p]
        return delta

    check(lm, plan, lambda row: [rule], run)


def gate_rule(plan: Plan, sae: SAE, held: Callable[[Tensor, int], list[bool]]) -> Rule:
    def rule(h: Tensor, P: int) -> Tensor:
        delta = torch.zeros_like(h)
        for p, on in enumerate(held(sae.encode(h), P)):
            if on and p >= P - 1:
                delta[p] = vector(plan)
        return delta

    return rule


def memory(acts: Tensor, latent: int, on: float, off: float) -> list[bool]:
    state, found = False, []
    for value in acts[:, latent].tolist():
        state = value > on or (state and value > off)
        found.append(state)
    return found


GATES: dict[str, Callable[[Tensor, int], list[bool]]] = {
    "5 > 0.6 & !(2 > 1) or 9 > 2": lambda a, P: [
        bool((x[5] > 0.6 and not x[2] > 1) or x[9] > 2) for x in a
    ],
    "5 > 1 : 0.1 | 2 > 1.5 : 0.2": lambda a, P: [
        x or y for x, y in zip(memory(a, 5, 1, 0.1), memory(a, 2, 1.5, 0.2), strict=True)
    ],
}


@pytest.mark.parametrize("run", list(RUNS))
@pytest.mark.parametrize("gate", list(GATES))
@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_gates_open_where_the_reference_says(
    architecture: str, gate: str, run: str, lm: LanguageModel
) -> None:
    sae = make_sae(lm, architecture)
    plan = with_gate(plan_of(lm, sae, scale=2.0), gate, sae)
    more = {"sae": sae} if architecture == "topk" else {}
    report = check(lm, plan, lambda row: [gate_rule(plan, sae, GATES[gate])], run, **more)
    # Both outcomes occur, or nothing would have been tested.
    assert report.tokens_touched > 0 and report.tokens_gated_off > 0


@pytest.mark.parametrize("run", ["greedy", "no cache", "chunked prefill", "beams"])
def test_a_gate_on_the_prompt_is_decided_once_for_each_row(run: str, lm: LanguageModel) -> None:
    sae = make_sae(lm)
    prompts = prompts_of(lm)
    found = []
    for prompt in prompts:
        here = resolve_site(lm, LAYER)
        with torch.no_grad(), capture([here]) as seen:
            lm.model(input_ids=torch.tensor([prompt.token_ids]))
        found.append(sae.encode(seen[here.key])[0, slice(*prompt.user_span), 5].max())
    low, middle, _ = sorted(float(value) for value in found)
    threshold = (low + middle) / 2
    plan = with_gate(plan_of(lm, sae), f"prompt: 5 > {threshold}", sae)

    def rules(row: int) -> list[Rule]:
        return [gate_rule(plan, sae, lambda a, P: [bool(found[row] > threshold)] * len(a))]

    report = check(lm, plan, rules, run)
    touched = [len(row.positions) > 0 for row in report.rows]
    assert any(touched) and not all(touched)


@pytest.mark.parametrize("run", list(RUNS))
def test_several_plans_edit_in_turn(run: str, lm: LanguageModel) -> None:
    sae = make_sae(lm)
    first, second = plan_of(lm, sae), plan_of(lm, sae, 11, method="project")
    d = sae.W_dec[11] / sae.W_dec[11].norm()

    def add(h: Tensor, P: int) -> Tensor:
        return (torch.arange(len(h)) >= P - 1)[:, None] * vector(first)

    def project(h: Tensor, P: int) -> Tensor:
        return (torch.arange(len(h)) >= P - 1)[:, None] * (h @ -d)[:, None] * d

    report = check(lm, [first, second], lambda row: [add, project], run)
    assert len(report.parts) == 2
    assert report.tokens_touched == report.parts[0].tokens_touched > 0


@pytest.mark.parametrize("run", list(RUNS))
@pytest.mark.parametrize("mixed", [False, True])
def test_each_row_follows_its_own_plan(mixed: bool, run: str, lm: LanguageModel) -> None:
    sae = make_sae(lm)
    a = plan_of(lm, sae)
    b = plan_of(lm, sae, 11, method="project") if mixed else plan_of(lm, sae, 5, scope="generated")
    d = sae.W_dec[11] / sae.W_dec[11].norm()

    def rule_a(h: Tensor, P: int) -> Tensor:
        return (torch.arange(len(h)) >= P - 1)[:, None] * vector(a)

    def rule_b(h: Tensor, P: int) -> Tensor:
        if mixed:
            return (torch.arange(len(h)) >= P - 1)[:, None] * (h @ -d)[:, None] * d
        return (torch.arange(len(h)) >= P)[:, None] * vector(b)

    report = check(lm, ByRow([b, None, a]), lambda row: [[rule_b], [], [rule_a]][row], run)
    per_prompt = len(report.rows) // 3
    assert all(len(row.positions) == 0 for row in report.rows[per_prompt : 2 * per_prompt])


def test_row_plans_must_be_as_many_as_rows(lm: LanguageModel) -> None:
    plan = plan_of(lm, make_sae(lm))
    with pytest.raises(UsageError, match="plans for 2 rows and the model was given 3"):
        check(lm, ByRow([plan, None]), lambda row: [], "greedy")
    with pytest.raises(UsageError, match="no plan for any row"):
        with steer(lm, ByRow([None])):
            pass


def test_a_cache_that_is_not_seen_is_an_error(lm: LanguageModel) -> None:
    """Rather than text that is steered at its first token alone."""
    plan = plan_of(lm, make_sae(lm))
    forward = type(lm.model).forward

    class Hidden:
        def __init__(self, cache: Any) -> None:
            self.inner = cache

    def hide(module: Any, args: Any, kwargs: Any) -> Any:
        name = "cache" if "cache" in kwargs else "past_key_values"
        return args, {**kwargs, name: None, "unknown": Hidden(kwargs[name])}

    def show(self: Any, *args: Any, unknown: Any = None, **kwargs: Any) -> Any:
        return forward(self, *args, **{**kwargs, "past_key_values": unknown.inner})

    ids = torch.tensor([[5, 6, 7]])
    handle = lm.model.register_forward_pre_hook(hide, with_kwargs=True)
    lm.model.forward = show.__get__(lm.model)
    with pytest.raises(UserError, match="no cache was found among its arguments"):
        with steer(lm, plan):
            lm.model.generate(ids, max_new_tokens=3, do_sample=False)
    handle.remove()


def test_assistant_turns_of_a_conversation(lm: LanguageModel) -> None:
    chat = encode_chat(
        lm,
        [
            {"role": "user", "content": "yield it"},
            {"role": "assistant", "content": "a name"},
            {"role": "user", "content": "and a tuple"},
        ],
    )
    words = [
        "".join(chat.rendered[a:b] for a, b in chat.offsets[start:end])
        for start, end in chat.replies
    ]
    assert words == ["a name"]
    ((first, end),) = chat.replies
    P = len(chat)
    plan = plan_of(lm, make_sae(lm), scope="assistant")
    for wide, wanted in (
        (False, [*range(first - 1, end), P - 1]),
        (True, None),
    ):
        with torch.no_grad(), steer(lm, plan, prompts=[chat], include_template=wide) as report:
            lm.model(input_ids=torch.tensor([chat.token_ids]))
        positions = report.rows[0].positions.tolist()
        if wanted is not None:
            assert positions == wanted
        else:
            text = "".join(chat.rendered[slice(*chat.offsets[p])] for p in positions)
            header = "<|im_start|>assistant\n"
            assert text == header + "a name<|im_end|>" + header


def test_special_tokens_can_be_left_out_of_any_scope(lm: LanguageModel) -> None:
    plan = plan_of(lm, make_sae(lm))
    ids = torch.tensor([[5, 6, 7, 2, 8, 1]])
    with torch.no_grad(), steer(lm, plan, prompt_lengths=[2], exclude_special=True) as report:
        lm.model(input_ids=ids)
    assert report.rows[0].positions.tolist() == [1, 2, 4]


def test_a_changed_gate_needs_its_own_columns(lm: LanguageModel) -> None:
    sae = make_sae(lm)
    plan = with_gate(plan_of(lm, sae), "5 > 1", sae)
    with pytest.raises(UserError, match="encoder columns of the latents"):
        dataclasses.replace(plan, gate="6 > 1")
    assert with_gate(plan, "").gate_W_enc is None
