"""The steering hook against a slow reference: one row, no padding, no cache, listed positions."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.hooks import capture, resolve_site, run_to
from saesteer.sae.models import LanguageModel, wrap_model
from saesteer.sae.prompts import EncodedPrompt, encode_prompt, pad_left
from saesteer.steering.hook import steer
from saesteer.steering.plan import Plan, PlannedLatent, TaskIdentity, make_plan

LAYER = 1
STEPS = 5
IDS = (3, 7, 11)
INSTRUCTION = "Use a list"
TEXTS = (
    f"The statement assigns a value to a name. {INSTRUCTION}",
    f"yield it. {INSTRUCTION} please",
    f"Modules are objects and so are the functions in them {INSTRUCTION}",
)

# Batched, padded or cached products are summed in another order than the reference's: a few float32
# roundings (1e-7 of values near 10) through four blocks.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


# ---------------------------------------------------------------------------------------------
# the slow reference


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
    doses = plan.doses()

    def edit(h: Tensor) -> Tensor:
        acts = sae.encode(h[None])[0]
        new = h.clone()
        if plan.method == "project":
            basis = torch.linalg.qr(sae.W_dec[list(plan.ids)].T).Q.T
            for d in basis:
                new = new - (h @ d) * d
            return new
        total = torch.zeros_like(h)
        for j, dose in zip(plan.ids, doses, strict=True):
            a = acts[j]
            change = {
                "add": dose,
                "set": dose - a,
                "min": max(a, dose) - a,
                "max": min(a, dose) - a,
                "scale": dose * a - a,
                "ablate": -a,
            }[plan.method]
            total = total + change * sae.W_dec[j]
        if plan.unit == "rel":
            total = total / total.norm() * plan.scale * h.norm()
        return h + total

    return edit


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


# ---------------------------------------------------------------------------------------------
# models, SAEs, plans


def make_sae(
    lm: LanguageModel, architecture: str = "standard", *, seed: int = 0, **fields: Any
) -> SAE:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    d_model, d_sae = lm.d_model, 24
    spec = SAESpec(
        architecture=architecture,  # type: ignore[arg-type]
        d_model=d_model,
        d_sae=d_sae,
        k=6 if architecture == "topk" else None,
        hook_name=f"blocks.{LAYER}.hook_resid_post",
        **fields,
    )
    return SAE(
        spec=spec,
        W_enc=noise(d_model, d_sae) / d_model**0.5,
        b_enc=noise(d_sae) * 0.3,
        W_dec=noise(d_sae, d_model) / d_model**0.5,
        b_dec=noise(d_model) * 0.3,
        threshold=noise(d_sae).abs() * 0.3 if architecture == "jumprelu" else None,
        source="somewhere",
        sha256=f"{architecture}{seed}",
    )


def ranked_plan(lm: LanguageModel, sae: SAE, **fields: Any) -> Plan:
    latents = [
        PlannedLatent(id=j, score=0.9, mu=1.5 + 0.5 * i, sigma=0.4, max=4.0)
        for i, j in enumerate(IDS)
    ]
    return make_plan(lm, sae, latents, **fields)


@pytest.fixture
def lm_of(tiny_lm: Callable[..., tuple[Any, Any]]) -> Callable[..., LanguageModel]:
    def make(family: str = "llama") -> LanguageModel:
        model, tokenizer = tiny_lm(family)
        # Random models meet the end-of-text token by chance; it would only shorten the comparison.
        model.generation_config.eos_token_id = None
        return wrap_model(model, tokenizer, f"tiny-{family}")

    return make


@pytest.fixture
def lm(lm_of: Callable[..., LanguageModel]) -> LanguageModel:
    return lm_of("llama")


def prompts_of(lm: LanguageModel, chat: bool = True) -> list[EncodedPrompt]:
    return [encode_prompt(lm, text, chat=chat) for text in TEXTS]


def generate(
    lm: LanguageModel, prompts: Sequence[EncodedPrompt], **options: Any
) -> tuple[Tensor, Tensor]:
    """New tokens `[rows, new]` and their logits `[rows, new, vocab]`, left-padded, greedy."""
    ids, mask = pad_left(lm, [prompt.token_ids for prompt in prompts])
    settings = {"max_new_tokens": STEPS, "do_sample": False, **options}
    output = lm.model.generate(
        input_ids=ids, attention_mask=mask, pad_token_id=lm.pad_id,
        return_dict_in_generate=True, output_logits=True, **settings,
    )  # fmt: skip
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


# ---------------------------------------------------------------------------------------------
# agreement with the reference


@pytest.mark.parametrize(
    "family",
    [
        "llama", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi", "olmo2", "mistral",
        "mixtral", "gemma3_multimodal", "llava",
    ],
)  # fmt: skip
def test_every_family_agrees_with_the_reference(
    family: str, lm_of: Callable[..., LanguageModel]
) -> None:
    lm = lm_of(family)
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae)
    prompts = prompts_of(lm)
    check_against_reference(lm, sae, plan, prompts)
    unsteered, _ = generate(lm, prompts)
    with steer(lm, plan):
        steered, _ = generate(lm, prompts)
    assert not torch.equal(unsteered, steered)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 5},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_every_way_to_run_generate_agrees_with_the_reference(
    family: str, options: dict[str, Any], lm_of: Callable[..., LanguageModel]
) -> None:
    lm = lm_of(family)
    sae = make_sae(lm)
    for scope in ("generation", "all"):
        plan = ranked_plan(lm, sae)
        check_against_reference(lm, sae, plan, prompts_of(lm), scope, **options)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize(
    "scope",
    [
        "generation", "generated", "prompt", "all", "last-prompt", "first:3", "span:4-12",
        "after-instruction",
    ],
)  # fmt: skip
def test_every_scope_agrees_with_the_reference(scope: str, cached: bool, lm: LanguageModel) -> None:
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae)
    options = {"instructions": ["never there", INSTRUCTION]}
    check_against_reference(lm, sae, plan, prompts_of(lm), scope, options, use_cache=cached)


@pytest.mark.parametrize("scope", ["generation", "all"])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
@pytest.mark.parametrize("method", ["add", "set", "min", "max", "scale", "ablate", "project"])
def test_every_method_agrees_with_the_reference(
    method: str, architecture: str, scope: str, lm: LanguageModel
) -> None:
    sae = make_sae(lm, architecture, apply_b_dec_to_input=architecture != "standard")
    scale = {"scale": 2.5}.get(method, 1.0)
    plan = ranked_plan(lm, sae, method=method, scale=scale)
    options = {"sae": sae} if architecture == "topk" else {}
    check_against_reference(lm, sae, plan, prompts_of(lm), scope, options)


@pytest.mark.parametrize("architecture", ["standard", "topk"])
def test_chunks_without_a_covered_position_pass_through_reading_methods(
    architecture: str, lm: LanguageModel
) -> None:
    sae = make_sae(lm, architecture)
    plan = ranked_plan(lm, sae, method="set")
    check_against_reference(
        lm, sae, plan, prompts_of(lm), "generated", {"sae": sae}, prefill_chunk_size=7
    )


def test_latents_in_units_of_their_rows_move_the_residual_as_the_sae_decodes(
    lm: LanguageModel,
) -> None:
    sae = make_sae(lm, "topk", rescale_acts_by_decoder_norm=True)
    plan = ranked_plan(lm, sae, method="set")
    h = torch.randn(1, 5, lm.d_model, generator=torch.Generator().manual_seed(1))
    from saesteer.steering.edits import make_edit

    delta = make_edit([plan], sae).delta(h, torch.ones(1, 5, dtype=torch.bool))
    acts = sae.encode(h)
    wanted = acts.clone()
    wanted[..., list(IDS)] = torch.tensor(plan.doses())
    # Differences of decoded values of size 1: some float32 roundings.
    torch.testing.assert_close(delta, sae.decode(wanted) - sae.decode(acts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.7, -0.4])
def test_relative_dose_is_the_share_of_each_tokens_own_norm(
    scale: float, lm: LanguageModel
) -> None:
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae, unit="rel", scale=scale)
    edit = reference_edit(sae, plan)
    prompts = prompts_of(lm)
    with steer(lm, plan) as report:
        tokens, logits = generate(lm, prompts)
    # float32 norms of 32 numbers.
    assert report.relative_dose == pytest.approx(abs(scale), rel=1e-5)
    for i, prompt in enumerate(prompts):
        P = len(prompt)
        new, scores = reference_greedy(
            lm, prompt.token_ids, edit, lambda row, P=P: range(P - 1, len(row))
        )
        assert tokens[i].tolist() == new
        torch.testing.assert_close(logits[i], scores, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("cached", [True, False])
def test_beams_score_their_sequences_as_the_reference_does(
    family: str, cached: bool, lm_of: Callable[..., LanguageModel]
) -> None:
    lm = lm_of(family)
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae)
    edit = reference_edit(sae, plan)
    prompts = prompts_of(lm)
    ids, mask = pad_left(lm, [prompt.token_ids for prompt in prompts])
    with steer(lm, plan) as report:
        output = lm.model.generate(
            input_ids=ids, attention_mask=mask, num_beams=3, num_return_sequences=2,
            max_new_tokens=STEPS, do_sample=False, use_cache=cached, pad_token_id=lm.pad_id,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    assert len(output.sequences) == 2 * len(prompts)
    for i, sequence in enumerate(output.sequences[:, ids.shape[1] :].tolist()):
        prompt = prompts[i // 2]
        P = len(prompt)
        row = [*prompt.token_ids, *sequence]
        logprobs = reference_logits(lm, row, edit, range(P - 1, len(row))).log_softmax(dim=-1)
        total = sum(logprobs[P - 1 + t, token] for t, token in enumerate(sequence)) / STEPS
        torch.testing.assert_close(output.sequences_scores[i], total, **CLOSE)
    rows = report.rows
    assert len(rows) == 3 * len(prompts)
    for i, row in enumerate(rows):
        P = len(prompts[i // 3])
        assert row.positions.tolist() == list(range(P - 1, P + STEPS - 1))


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 5}],
    ids=str,
)
def test_sampled_sequences_score_as_the_reference_does(
    options: dict[str, Any], lm: LanguageModel
) -> None:
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae)
    edit = reference_edit(sae, plan)
    prompts = prompts_of(lm)
    torch.manual_seed(0)
    with steer(lm, plan) as report:
        tokens, logits = generate(lm, prompts, do_sample=True, num_return_sequences=2, **options)
    assert len(report.rows) == len(tokens) == 2 * len(prompts)
    assert tokens[0].tolist() != tokens[1].tolist()
    for i, new in enumerate(tokens.tolist()):
        P = len(prompts[i // 2])
        row = [*prompts[i // 2].token_ids, *new]
        wanted = reference_logits(lm, row, edit, range(P - 1, len(row)))[P - 1 : -1]
        torch.testing.assert_close(logits[i], wanted, **CLOSE)


def test_drafts_that_are_rolled_back_are_steered_and_counted_once(lm: LanguageModel) -> None:
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae)
    prompt = prompts_of(lm)[0]
    new, _ = reference_greedy(
        lm, prompt.token_ids, reference_edit(sae, plan),
        lambda row: range(len(prompt) - 1, len(row)), steps=12,
    )  # fmt: skip
    with steer(lm, plan) as report:
        tokens, _ = generate(lm, [prompt], prompt_lookup_num_tokens=2, max_new_tokens=12)
    assert tokens[0].tolist() == new
    touched = report.rows[0].positions.tolist()
    assert touched == list(range(len(prompt) - 1, touched[-1] + 1))
    assert touched[-1] - (len(prompt) + 10) in (0, 1, 2)  # a last draft may lie beyond the end


def test_padding_without_a_mask_is_what_generate_takes_it_for(lm: LanguageModel) -> None:
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae)
    prompts = prompts_of(lm, chat=False)
    ids, mask = pad_left(lm, [prompt.token_ids for prompt in prompts])
    ids = torch.where(mask == 0, 0, ids)
    with steer(lm, plan, scope="last-prompt") as report:
        lm.model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert [row.positions.tolist() for row in report.rows] == [[len(p) - 1] for p in prompts]
    # When padding is also an end of text, generate takes it for text, and the rows are all as long.
    with steer(lm, plan, scope="last-prompt") as report:
        lm.model.generate(
            inputs=ids, max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=[0, 2]
        )
    assert [row.positions.tolist() for row in report.rows] == [[ids.shape[1] - 1]] * 3


def test_embeddings_in_place_of_ids_are_steered_alike(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    ids, mask = pad_left(lm, [prompt.token_ids for prompt in prompts_of(lm)])
    embeds = lm.model.get_input_embeddings()(ids)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": lm.pad_id}
    with steer(lm, plan) as by_ids:
        wanted = lm.model.generate(input_ids=ids, attention_mask=mask, **options)
    with steer(lm, plan) as by_embeds:
        found = lm.model.generate(inputs_embeds=embeds, attention_mask=mask, **options)
    assert torch.equal(found, wanted[:, ids.shape[1] :])
    for one, other in zip(by_ids.rows, by_embeds.rows, strict=True):
        assert one.positions.tolist() == other.positions.tolist()


def test_a_conversation_goes_on_from_its_cache(lm: LanguageModel) -> None:
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae)
    first = torch.tensor([prompts_of(lm, chat=False)[0].token_ids])
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    said = lm.model.generate(first, **options)
    second = torch.cat([said.sequences, torch.tensor([[5, 6, 7]])], dim=1)
    P = second.shape[1]
    new, _ = reference_greedy(
        lm, second[0].tolist(), reference_edit(sae, plan), lambda row: range(P - 1, len(row)), 4
    )
    for mask in ({}, {"attention_mask": torch.ones_like(second)}):
        cache = copy.deepcopy(said.past_key_values)
        with steer(lm, plan) as report:
            output = lm.model.generate(second, past_key_values=cache, **mask, **options)
        assert output.sequences[0, P:].tolist() == new
        assert report.rows[0].positions.tolist() == list(range(P - 1, P + 3))


# ---------------------------------------------------------------------------------------------
# the model called directly


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scope", ["generation", "prompt", "all", "span:4-12"])
def test_a_padded_forward_pass_agrees_with_the_reference(
    scope: str, side: str, lm: LanguageModel
) -> None:
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae)
    prompts = prompts_of(lm)
    answers = ([5, 6, 7], [8], [9, 10, 11, 12, 13])
    rows = [[*prompt.token_ids, *new] for prompt, new in zip(prompts, answers, strict=True)]
    ids, mask = pad_left(lm, rows)
    if side == "right":
        for i, row in enumerate(rows):
            shift = ids.shape[1] - len(row)
            ids[i], mask[i] = ids[i].roll(-shift), mask[i].roll(-shift)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), steer(lm, plan, scope=scope, prompts=prompts):
        logits = lm.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    special = set(lm.special_ids.tolist())
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        wanted = reference_logits(
            lm, row, reference_edit(sae, plan), positions_of(scope, prompt, row, special)
        )
        torch.testing.assert_close(logits[i][mask[i] == 1].float(), wanted, **CLOSE)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_decoding_loop_of_ones_own_is_steered_from_its_first_row_on(
    family: str, cached: bool, lm_of: Callable[..., LanguageModel]
) -> None:
    lm = lm_of(family)
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae)
    prompt = prompts_of(lm)[1].token_ids
    new, _ = reference_greedy(
        lm, prompt, reference_edit(sae, plan), lambda row: range(len(prompt) - 1, len(row))
    )
    row, cache = list(prompt), None
    with torch.no_grad(), steer(lm, plan) as report:
        for _ in range(STEPS):
            chunk = row if cache is None else row[-1:]
            output = lm.model(torch.tensor([chunk]), past_key_values=cache, use_cache=cached)
            cache = output.past_key_values if cached else None
            row.append(int(output.logits[0, -1].argmax()))
    assert row[len(prompt) :] == new
    assert len(report.rows) == 1
    assert report.rows[0].positions.tolist() == list(
        range(len(prompt) - 1, len(prompt) + STEPS - 1)
    )


def test_another_row_is_another_prompt(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    with torch.no_grad(), steer(lm, plan) as report:
        lm.model(torch.tensor([[5, 6, 7]]))
        lm.model(torch.tensor([[5, 6, 7]]))  # again: counted once
        lm.model(torch.tensor([[5, 9, 7, 8]]))
        lm.model(torch.tensor([[5, 9]]))
    assert [row.positions.tolist() for row in report.rows] == [[2], [3], [1]]
    assert [row.call for row in report.rows] == [0, 1, 2]


def test_prompt_lengths_say_where_the_answer_begins(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.no_grad(), steer(lm, plan, prompt_lengths=[1, 3]) as report:
        lm.model(input_ids=ids)
    assert [row.positions.tolist() for row in report.rows] == [[0, 1, 2, 3], [2, 3]]
    with pytest.raises(UsageError, match="prompt_lengths.*names 1 rows.*given 2"):
        with torch.no_grad(), steer(lm, plan, prompt_lengths=[1]):
            lm.model(input_ids=ids)


def test_a_4d_mask_hides_its_padding(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    real = torch.tensor([False, False, True, True, True])
    allowed = torch.tril(torch.ones(5, 5, dtype=torch.bool)) & real
    for mask in (allowed, torch.zeros(5, 5).masked_fill(~allowed, torch.finfo(torch.float32).min)):
        with torch.no_grad(), steer(lm, plan, scope="all", include_first=True) as report:
            lm.model(input_ids=ids, attention_mask=mask[None, None])
        assert report.rows[0].positions.tolist() == [0, 1, 2]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_multimodal"])
def test_the_text_tower_alone_is_steered_like_the_whole_model(
    family: str, lm_of: Callable[..., LanguageModel]
) -> None:
    lm = lm_of(family)
    plan = ranked_plan(lm, make_sae(lm))
    ids = torch.tensor([prompts_of(lm)[0].token_ids])
    last = resolve_site(lm, -1)
    with torch.no_grad(), steer(lm, plan) as report, capture([last]) as whole:
        lm.model(input_ids=ids, attention_mask=torch.ones_like(ids))
    with torch.no_grad(), steer(lm, plan) as alone:
        seen = run_to(lm, [last], input_ids=ids, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(seen[last.key], whole[last.key], rtol=0, atol=0)
    assert alone.tokens_touched == report.tokens_touched == 1


# ---------------------------------------------------------------------------------------------
# what stays as it was


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_only_the_steered_positions_of_the_steered_layer_on_change(
    family: str, lm_of: Callable[..., LanguageModel]
) -> None:
    lm = lm_of(family)
    plan = ranked_plan(lm, make_sae(lm))
    ids = torch.tensor([prompts_of(lm)[0].token_ids])
    points = [resolve_site(lm, layer) for layer in range(lm.n_layers)]
    with torch.no_grad():
        with capture(points) as before:
            lm.model(input_ids=ids)
        with steer(lm, plan), capture(points) as during:
            lm.model(input_ids=ids)
        with capture(points) as after:
            lm.model(input_ids=ids)
    for point in points:
        assert torch.equal(before[point.key], after[point.key])
        changed = (before[point.key] != during[point.key]).any(dim=-1)[0]
        if point.layer < LAYER:
            assert not changed.any()
        else:  # causal attention: nothing before the last position can change
            assert not changed[:-1].any() and changed[-1]


@pytest.mark.parametrize("method", ["add", "set", "project"])
def test_the_blocks_own_output_is_never_written_to(method: str, lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm), method=method)
    seen: list[tuple[Tensor, Tensor]] = []
    handle = lm.blocks[LAYER].register_forward_hook(
        lambda module, args, output: seen.append((output, output.clone()))
    )
    with torch.no_grad(), steer(lm, plan, scope="all"):
        lm.model(input_ids=torch.tensor([[5, 6, 7]]))
    handle.remove()
    assert seen and all(torch.equal(output, copy) for output, copy in seen)


def hooks_on(lm: LanguageModel) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lm.model.modules()
    )


def test_nothing_is_left_on_the_model_and_the_bodys_error_passes(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    prompts = prompts_of(lm)
    before = generate(lm, prompts)[1]
    with pytest.raises(ZeroDivisionError), steer(lm, plan):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), steer(lm, plan):
        generate(lm, prompts)
        raise ZeroDivisionError
    assert hooks_on(lm) == 0
    assert "generate" not in vars(lm.model)
    assert torch.equal(generate(lm, prompts)[1], before)


def test_a_failed_pass_does_not_confuse_the_next(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    prompts = prompts_of(lm)
    with steer(lm, plan):
        wanted = generate(lm, prompts)[1]
    with steer(lm, plan):
        with pytest.raises(IndexError):
            lm.model.generate(input_ids=torch.tensor([[5, 10**6]]), max_new_tokens=2)
        assert torch.equal(generate(lm, prompts)[1], wanted)


@pytest.mark.parametrize("fails", [False, True])
def test_one_context_may_see_every_kind_of_pass(fails: bool, lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    prompts = prompts_of(lm)
    last = resolve_site(lm, -1)
    with torch.no_grad(), steer(lm, plan) as report:
        generate(lm, prompts[:1])
        if fails:
            with pytest.raises(IndexError):
                lm.model(input_ids=torch.tensor([[5, 10**6]]))
        run_to(lm, [last], input_ids=torch.tensor([[5, 6, 7]]))
        lm.model(input_ids=torch.tensor([[8, 9]]))
        generate(lm, prompts[1:])
    first, second, third = (list(range(len(p) - 1, len(p) + STEPS - 1)) for p in prompts)
    failed: list[list[int]] = [[]] if fails else []
    assert [row.positions.tolist() for row in report.rows] == [
        first, *failed, [2], [1], second, third
    ]  # fmt: skip


def test_a_generate_of_ones_own_is_put_back(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    calls = []
    original = lm.model.generate

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return original(*args, **kwargs)

    lm.model.generate = mine
    with steer(lm, plan):
        generate(lm, prompts_of(lm))
    assert lm.model.generate is mine
    assert len(calls) == 1


def test_multiplier_0_is_off_to_the_bit(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    prompts = prompts_of(lm)
    before = generate(lm, prompts)[1]
    with steer(lm, plan, scale=0.0) as report:
        assert hooks_on(lm) == 0
        assert torch.equal(generate(lm, prompts)[1], before)
    assert report.tokens_touched == 0
    assert report.relative_dose is None


def test_a_model_that_was_compiled_before_is_steered_and_then_no_more(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    ids = torch.tensor([prompts_of(lm)[0].token_ids])
    with torch.no_grad():
        before = lm.model(input_ids=ids).logits
        with steer(lm, plan):
            wanted = lm.model(input_ids=ids).logits
        lm.model.forward = torch.compile(lm.model.forward, backend="eager")
        for _ in range(2):
            assert torch.equal(lm.model(input_ids=ids).logits, before)
            with steer(lm, plan) as report:
                assert torch.equal(lm.model(input_ids=ids).logits, wanted)
            assert report.rows[0].positions.tolist() == [ids.shape[1] - 1]


# ---------------------------------------------------------------------------------------------
# dtypes, gradients, nesting


def test_bfloat16_residuals_are_edited_in_float32_and_stay_bfloat16(
    tiny_lm: Callable[..., tuple[Any, Any]],
) -> None:
    model, tokenizer = tiny_lm("llama")
    lm = wrap_model(model.bfloat16(), tokenizer, "tiny")
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae)
    edit = reference_edit(sae, plan)
    ids = torch.tensor([prompts_of(lm)[0].token_ids])
    here = resolve_site(lm, LAYER)
    with torch.no_grad():
        with capture([here]) as before:
            lm.model(input_ids=ids)
        with steer(lm, plan), capture([here]) as during:
            logits = lm.model(input_ids=ids).logits
    assert during[here.key].dtype == logits.dtype == torch.bfloat16
    assert torch.equal(during[here.key][:, :-1], before[here.key][:, :-1])
    wanted = edit(before[here.key][0, -1].float()).bfloat16()
    # Both round one float32 sum of three terms, added in another order: one bfloat16 step at most.
    torch.testing.assert_close(during[here.key][0, -1], wanted, rtol=2**-7, atol=0.0)


@pytest.mark.parametrize("method", ["add", "set"])
def test_gradients_flow_through_the_edit(method: str, lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm), method=method)
    prompts = prompts_of(lm)
    embeds = lm.model.get_input_embeddings()(torch.tensor([prompts[0].token_ids]))
    embeds.requires_grad_()
    with steer(lm, plan) as report:
        with torch.inference_mode():
            lm.model(input_ids=torch.tensor([[5, 6, 7]]))
        lm.model(inputs_embeds=embeds).logits[0, -1].sum().backward()
    assert embeds.grad is not None and bool((embeds.grad[0, -1] != 0).any())
    assert report.tokens_touched == 2


def test_nested_plans_add_up(lm: LanguageModel) -> None:
    sae, other = make_sae(lm), make_sae(lm, seed=1)
    first, second = ranked_plan(lm, sae), ranked_plan(lm, other, scale=0.5)
    prompts = prompts_of(lm)
    edits = [reference_edit(sae, first), reference_edit(other, second)]
    with steer(lm, first) as outer, steer(lm, second, scope="generated") as inner:
        tokens, logits = generate(lm, prompts)
    for i, prompt in enumerate(prompts):
        P, row = len(prompt), list(prompt.token_ids)
        for t in range(STEPS):
            with (
                edited_at(lm, LAYER, edits[0], range(P - 1, len(row))),
                edited_at(lm, LAYER, edits[1], range(P, len(row))),
            ):
                wanted = logits_of(lm, row)[-1]
            torch.testing.assert_close(logits[i, t], wanted, **CLOSE)
            row.append(int(wanted.argmax()))
        assert tokens[i].tolist() == row[P:]
    assert outer.tokens_touched == STEPS * 3
    assert inner.tokens_touched == (STEPS - 1) * 3
    assert "generate" not in vars(lm.model) and hooks_on(lm) == 0


def test_nested_contexts_may_close_in_any_order(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    prompts = prompts_of(lm)
    with steer(lm, plan):
        wanted = generate(lm, prompts)[1]
    outer, inner = steer(lm, plan), steer(lm, plan)
    outer.__enter__()
    inner.__enter__()
    generate(lm, prompts)
    outer.__exit__(None, None, None)
    assert torch.equal(generate(lm, prompts)[1], wanted)
    inner.__exit__(None, None, None)
    assert "generate" not in vars(lm.model) and hooks_on(lm) == 0


# ---------------------------------------------------------------------------------------------
# the report


@pytest.mark.parametrize("cached", [True, False])
def test_the_report_gives_norms_and_doses_of_each_position(cached: bool, lm: LanguageModel) -> None:
    sae = make_sae(lm)
    plan = ranked_plan(lm, sae)
    prompts = prompts_of(lm)
    delta = sum(d * sae.W_dec[j] for j, d in zip(plan.ids, plan.doses(), strict=True)).norm()
    with steer(lm, plan) as report:
        tokens, _ = generate(lm, prompts, use_cache=cached)
        first = report.tokens_touched
        generate(lm, prompts, use_cache=cached)
    assert first == 3 * STEPS
    assert report.tokens_touched == 2 * first
    here = resolve_site(lm, LAYER)
    ratios = []
    for i, (prompt, new) in enumerate(zip(prompts, tokens.tolist(), strict=True)):
        row = torch.tensor([[*prompt.token_ids, *new[:-1]]])
        with torch.no_grad(), capture([here]) as seen:
            # The steered layer's own edit is the only thing below it that changes: nothing.
            with edited_at(lm, LAYER, lambda h: h, []):
                lm.model(input_ids=row)
        norms = seen[here.key][0, len(prompt) - 1 :].norm(dim=-1)
        found = report.call_rows(0)[i]
        torch.testing.assert_close(found.residual_norms[:1], norms[:1], **CLOSE)
        torch.testing.assert_close(
            found.delta_norms, delta.expand(len(found.positions)), rtol=1e-5, atol=0.0
        )
        ratios.append(found.relative_doses)
        short = found.before(len(prompt) + 2)
        assert short.positions.tolist() == [len(prompt) - 1, len(prompt), len(prompt) + 1]
        assert torch.equal(short.relative_doses, found.relative_doses[:3])
    assert report.relative_dose == pytest.approx(float(np.median(torch.cat(ratios).numpy())))
    assert report.delta_norm == pytest.approx(float(delta), rel=1e-5)
    assert report.passes == 2 * STEPS


def test_scope_exclusions_can_be_lifted(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    prompt = prompts_of(lm)[1]
    ids = torch.tensor([prompt.token_ids])
    special = set(lm.special_ids.tolist())
    assert prompt.token_ids[0] in special
    text = list(range(*prompt.user_span))

    def touched(**options: Any) -> list[int]:
        with torch.no_grad(), steer(lm, plan, scope="prompt", **options) as report:
            lm.model(input_ids=ids)
        return report.rows[0].positions.tolist()  # type: ignore[no-any-return]

    everything = list(range(len(prompt)))
    assert touched(prompts=[prompt]) == text
    assert touched(prompts=[prompt], include_first=True) == [0, *text]
    assert touched(prompts=[prompt], include_template=True) == everything[1:]
    assert touched(prompts=[prompt], include_first=True, include_template=True) == everything
    # Without prompts, the special tokens are all that is known of the template.
    assert touched() == [p for p in everything[1:] if prompt.token_ids[p] not in special]


# ---------------------------------------------------------------------------------------------
# errors


def test_a_run_that_touches_no_token_is_an_error(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    with pytest.raises(UserError, match="touched no token: --scope generated .* 1 forward passes"):
        with steer(lm, plan, scope="generated"):
            generate(lm, prompts_of(lm), max_new_tokens=1)


def test_a_model_that_does_not_run_is_an_error(lm: LanguageModel) -> None:
    with pytest.raises(UserError, match="the model did not run inside steer"):
        with steer(lm, ranked_plan(lm, make_sae(lm))):
            pass


def test_a_plan_for_another_model_needs_force(lm_of: Callable[..., LanguageModel]) -> None:
    lm, other = lm_of("llama"), lm_of("qwen3")
    plan = ranked_plan(lm, make_sae(lm))
    with pytest.raises(UserError, match="made for tiny-llama .*tiny-qwen3 differs.*--force"):
        with steer(other, plan):
            pass
    with steer(other, plan, force=True) as report:
        generate(other, prompts_of(other))
    assert report.tokens_touched == 3 * STEPS


def test_prompts_that_are_not_run_are_an_error(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    prompts = prompts_of(lm)
    with pytest.raises(UserError, match="row 0 .* begins with none of the 2 prompts"):
        with steer(lm, plan, scope="all", prompts=prompts[1:]):
            generate(lm, prompts[:1])


@pytest.mark.parametrize("scope", ["span:0-4", "after-instruction"])
def test_scopes_on_text_need_the_prompts(scope: str, lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    with pytest.raises(UsageError, match=f"--scope {scope} depends on the text of the prompts"):
        with steer(lm, plan, scope=scope, instructions=["x"]):
            pass


def test_after_instruction_needs_the_wordings(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    with pytest.raises(UsageError, match="needs the texts of the instruction"):
        with steer(lm, plan, scope="after-instruction", prompts=prompts_of(lm)):
            pass


def test_a_site_off_the_residual_stream_is_an_error(lm: LanguageModel) -> None:
    sae = make_sae(lm)
    sae = dataclasses.replace(sae, spec=dataclasses.replace(sae.spec, hook_name=""))
    plan = ranked_plan(lm, sae, layer=LAYER, site="model.layers.1.mlp.up_proj")
    with pytest.raises(UserError, match=r"--site .*up_proj.* shape \[3, \d+, 64\], not"):
        with steer(lm, plan):
            generate(lm, prompts_of(lm))


def test_reading_a_topk_sae_needs_the_sae_that_the_plan_was_made_from(
    lm: LanguageModel, tmp_path: Any
) -> None:
    sae = make_sae(lm, "topk")
    folder = tmp_path / "sae"
    sha256 = sae.save(folder)
    plan = ranked_plan(
        lm, dataclasses.replace(sae, source=str(folder), sha256=sha256), method="set"
    )
    check_against_reference(lm, sae, plan, prompts_of(lm))
    make_sae(lm, "topk", seed=5).save(folder)
    with pytest.raises(UserError, match="is not the one the plan was made from"):
        with steer(lm, plan):
            pass
    (folder / "cfg.json").unlink()
    with pytest.raises(UserError, match="TopK SAE needs the SAE itself.*give --sae"):
        with steer(lm, plan):
            pass
    # Adding reads no latent and needs no SAE.
    check_against_reference(lm, sae, dataclasses.replace(plan, method="add"), prompts_of(lm))


def test_encoder_decoders_are_refused(lm: LanguageModel) -> None:
    plan = ranked_plan(lm, make_sae(lm))
    lm.model.config.is_encoder_decoder = True
    with pytest.raises(UserError, match="tiny-llama is an encoder-decoder"):
        with steer(lm, plan):
            pass


def test_a_plan_may_be_given_by_its_path(lm: LanguageModel, tmp_path: Any) -> None:
    from saesteer.steering.plan_file import save_plan

    plan = ranked_plan(lm, make_sae(lm))
    prompts = prompts_of(lm)
    save_plan(plan, tmp_path / "plan")
    with steer(lm, plan):
        wanted = generate(lm, prompts)[1]
    with steer(lm, tmp_path / "plan"):
        assert torch.equal(generate(lm, prompts)[1], wanted)


def test_after_instruction_takes_the_wordings_of_the_plans_task(lm: LanguageModel) -> None:
    from saesteer.steering.tasks import compose, load_task

    task = load_task("french")
    plan = ranked_plan(lm, make_sae(lm), task=TaskIdentity(task.name, task.hash))
    prompts = [
        encode_prompt(lm, compose("Names are bound.", text), chat=True)
        for text in (task.instruction, task.variants[-1].text)
    ]
    with steer(lm, plan, scope="after-instruction", prompts=prompts) as report:
        generate(lm, prompts)
    for row, prompt in zip(report.rows, prompts, strict=True):
        tail = list(range(prompt.user_span[1], len(prompt)))
        assert row.positions[: len(tail)].tolist() == tail
    for unknown in (TaskIdentity("mine", "0"), TaskIdentity("french", "0")):
        old = dataclasses.replace(plan, task=unknown)
        with pytest.raises(UsageError, match=f"this plan of {unknown.name} does not hold them"):
            with steer(lm, old, scope="after-instruction", prompts=prompts):
                pass
    # The plan's own wordings come first, whatever the name says.
    prompts = [encode_prompt(lm, "Names are bound. Go on as I said, please.", chat=True)]
    own = dataclasses.replace(plan, task=TaskIdentity("french", "0", ("Go on",)))
    with steer(lm, own, scope="after-instruction", prompts=prompts) as report:
        generate(lm, prompts)
    at = prompts[0].text.index("Go on")
    assert report.rows[0].positions[0] == prompts[0].token_span(at, at + len("Go on"))[1]
