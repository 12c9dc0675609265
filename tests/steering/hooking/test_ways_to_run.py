"""Ways to run a model under steering where it would be easy to edit the wrong tokens silently."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

from saesteer.checkpoints.errors import UserError
from saesteer.sae.model.hooks import hooked, resolve_site
from saesteer.sae.model.language_model import LanguageModel, wrap_model
from saesteer.steering.hooking.chats import encode_chat
from saesteer.steering.hooking.hook import steer
from saesteer.steering.hooking.tracking.finite import NotFiniteError

from ..small_plans import small_plan

pytestmark = pytest.mark.usefixtures("endless")

ROWS = ([5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [20, 21, 22, 23, 24])


def plan_of(lm: LanguageModel, **fields: Any) -> Any:
    return small_plan(lm, [0, 1], scale=0.5, scope="generation", **fields)


def say(lm: LanguageModel, row: list[int], **options: Any) -> list[int]:
    ids = torch.tensor([row])
    made = lm.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
        pad_token_id=2, **options,
    )  # fmt: skip
    return list(made[0].tolist())


def in_threads(*works: Callable[[], Any]) -> list[BaseException]:
    errors: list[BaseException] = []

    def run(work: Callable[[], Any]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_threads_inside_one_context_get_what_each_would_get_alone(lm: LanguageModel) -> None:
    plan = plan_of(lm)
    with steer(lm, plan):
        wanted = [say(lm, row) for row in ROWS]
    found: dict[int, list[int]] = {}

    def work(i: int) -> Callable[[], None]:
        return lambda: found.update({i: say(lm, ROWS[i])})

    for _ in range(3):
        found.clear()
        with steer(lm, plan) as report:
            assert not in_threads(*map(work, range(len(ROWS))))
        assert [found[i] for i in range(len(ROWS))] == wanted
        assert report.tokens_touched == 8 * len(ROWS)


def test_rows_with_caches_of_their_own_may_take_turns(lm: LanguageModel) -> None:
    heard: list[list[int]] = []

    def run(order: list[int]) -> dict[int, list[Tensor]]:
        caches = {i: DynamicCache(config=lm.model.config) for i in order}
        said: dict[int, list[Tensor]] = {i: [] for i in order}
        with steer(lm, plan_of(lm)) as report:
            for i in order:
                said[i].append(lm.model(torch.tensor([ROWS[i]]), past_key_values=caches[i]).logits)
            for i in order:
                for token in (30, 31):
                    out = lm.model(torch.tensor([[token]]), past_key_values=caches[i])
                    said[i].append(out.logits)
        heard.append(sorted(len(row.positions) for row in report.rows))
        return said

    together, alone = run([0, 1]), [run([0]), run([1])]
    for i in (0, 1):
        for ours, theirs in zip(together[i], alone[i][i], strict=True):
            assert torch.equal(ours, theirs)
    assert heard == [[3, 3], [3], [3]]


def test_a_second_context_of_another_thread_is_refused(lm: LanguageModel) -> None:
    def open_one() -> None:
        with steer(lm, plan_of(lm)):
            say(lm, ROWS[0])

    with steer(lm, plan_of(lm)):
        say(lm, ROWS[0])
        (error,) = in_threads(open_one)
    assert isinstance(error, UserError) and "is being steered by another thread" in str(error)
    open_one()


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("negative", [None, [30, 31], list(range(30, 60))])
def test_the_negative_prompt_of_guidance_is_left_alone(
    negative: list[int] | None, cache: bool, lm: LanguageModel
) -> None:
    options: dict[str, Any] = {"guidance_scale": 1.5, "use_cache": cache}
    if negative is not None:
        options["negative_prompt_ids"] = torch.tensor([negative])
    plain = say(lm, ROWS[0], **options)
    with steer(lm, plan_of(lm)) as report:
        steered = say(lm, ROWS[0], **options)
    assert report.rows[0].positions.tolist() == list(range(6, 14))
    assert steered != plain
    # A vector too short to change a float32: every answer as before.
    nothing = plan_of(lm).with_changes(scale=1e-20)
    with steer(lm, nothing):
        assert say(lm, ROWS[0], **options) == plain


def test_packed_requests_are_refused_with_the_reason(lm: LanguageModel) -> None:
    with pytest.raises(UserError, match="generate_batch packs several requests into one row"):
        with steer(lm, plan_of(lm)):
            lm.model.generate_batch([ROWS[0], ROWS[1]])
    assert "generate_batch" not in vars(lm.model)


def test_several_texts_in_one_row_are_refused(lm: LanguageModel) -> None:
    packed = torch.tensor([[*ROWS[1], *ROWS[2]]])
    places = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with pytest.raises(UserError, match="position ids that say 0 of a token .* at position 3"):
        with steer(lm, plan_of(lm)):
            lm.model(packed, position_ids=places)


def test_a_mask_of_another_width_is_refused(lm: LanguageModel) -> None:
    cache = DynamicCache(config=lm.model.config)
    with pytest.raises(UserError, match="mask of 1 columns for 8 tokens"):
        with steer(lm, plan_of(lm)):
            lm.model(torch.tensor([ROWS[0]]), past_key_values=cache)
            one = torch.tensor([[30]])
            lm.model(one, past_key_values=cache, attention_mask=torch.ones_like(one))


def test_layers_of_a_cache_that_disagree_are_refused(lm: LanguageModel) -> None:
    cache = DynamicCache(config=lm.model.config)
    with pytest.raises(UserError, match="layers of the cache of tiny hold 5, 7 tokens"):
        with steer(lm, plan_of(lm)):
            lm.model(torch.tensor([ROWS[0]]), past_key_values=cache)
            layer = cache.layers[2]
            layer.keys, layer.values = layer.keys[:, :, :5], layer.values[:, :, :5]
            lm.model(torch.tensor([[30]]), past_key_values=cache)


@pytest.mark.parametrize("asked_before", [True, False])
@pytest.mark.parametrize("site", ["resid_post", "mlp_out"])
def test_hidden_states_hold_the_edit_whenever_they_were_asked_for(
    site: str, asked_before: bool, lm: LanguageModel
) -> None:
    ids = torch.tensor([ROWS[0]])
    if asked_before:
        lm.model(ids, output_hidden_states=True)
    seen: list[Tensor] = []
    plan = plan_of(lm).with_changes(scope="all", site=site)
    with (
        steer(lm, plan),
        hooked(resolve_site(lm, 1), lambda h: seen.append(h.clone())),
    ):
        found = lm.model(ids, output_hidden_states=True).hidden_states[2]
    assert torch.equal(found, seen[0])


def test_what_torch_compile_returns_is_steered(lm: LanguageModel) -> None:
    plan, ids = plan_of(lm), torch.tensor([ROWS[0]])
    with steer(lm, plan):
        logits, said = lm.model(ids).logits, say(lm, ROWS[0])
    wrapped = wrap_model(torch.compile(lm.model, backend="eager"), lm.tokenizer, "tiny")
    assert wrapped.fingerprint == lm.fingerprint
    with steer(wrapped, plan) as report:
        assert torch.equal(wrapped.model(ids).logits, logits)
        assert say(wrapped, ROWS[0]) == said
    assert report.tokens_touched == 1 + 8
    assert "generate" not in vars(lm.model)


@pytest.fixture
def mamba(lm: LanguageModel) -> LanguageModel:
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=4, state_size=8, pad_token_id=2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = MambaForCausalLM(config)
    model.generation_config.eos_token_id = None
    return wrap_model(model, lm.tokenizer, "mamba")


def test_a_state_space_model_is_steered_with_its_cache_as_without(mamba: LanguageModel) -> None:
    plan = plan_of(mamba)
    with steer(mamba, plan) as cached:
        said = say(mamba, ROWS[0])
    with steer(mamba, plan) as whole:
        assert say(mamba, ROWS[0], use_cache=False) == said
    places = [report.rows[0].positions.tolist() for report in (cached, whole)]
    assert places == [list(range(6, 14))] * 2
    assert said != say(mamba, ROWS[0])


def test_a_state_that_was_filled_before_is_refused(mamba: LanguageModel) -> None:
    filled = mamba.model(torch.tensor([ROWS[0]]), use_cache=True)
    cache = next(value for key, value in filled.items() if "cache" in key)
    name = next(key for key in filled if "cache" in key)
    with pytest.raises(UserError, match="was filled outside"):
        with steer(mamba, plan_of(mamba)):
            mamba.model(torch.tensor([[30]]), use_cache=True, **{name: cache})


@pytest.mark.parametrize("sampling", [{}, {"do_sample": True}])
def test_logits_that_are_no_numbers_are_an_error(
    sampling: dict[str, Any], lm: LanguageModel
) -> None:
    half = wrap_model(copy.deepcopy(lm.model).half(), lm.tokenizer, "tiny")
    ids = torch.tensor([ROWS[0]])
    with pytest.raises(NotFiniteError, match="more than float16 can hold; lower `scale`, or load"):
        with steer(half, plan_of(half).with_changes(scale=1e6)):
            half.model.generate(ids, max_new_tokens=3, pad_token_id=2, **sampling)


TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}"
    "{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for p in m['content'] or [] %}{{ p['text'] }}{% endfor %}{% endif %}"
    "{% for t in m['tool_calls'] or [] %}{{ '(' + t['function']['name'] + ')' }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
@pytest.mark.parametrize("last", ["user", "tool"])
def test_turns_that_only_call_a_tool(last: str, content: dict[str, Any], lm: LanguageModel) -> None:
    lm.tokenizer.chat_template = TOOLS
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "weather"}}], **content}
    talk = [
        {"role": "user", "content": [{"type": "text", "text": "hi there"}]},
        call,
        {"role": last, "content": "It is sunny. "},
    ]
    chat = encode_chat(lm, talk)
    assert chat.rendered == lm.tokenizer.apply_chat_template(
        talk, tokenize=False, add_generation_prompt=True
    )
    spans = [(role, chat.rendered[start:end]) for role, start, end in chat.messages]
    assert spans == [("user", "hi there"), (last, "It is sunny. ")]
    assert chat.replies == ()
