"""A site is one row for each token, once in a pass; whatever else blocks pass is refused."""

from collections.abc import Callable

import pytest
import torch

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.model.hooks import HookPoint, hooked, resolve_site, run_to
from saesteer.sae.model.language_model import LanguageModel, wrap_model

from .family_sites import IDS, build

Shared = Callable[..., LanguageModel]


def tiny(kind: str, blocks: str | None = None) -> LanguageModel:
    return wrap_model(build(kind), None, kind, blocks)


@pytest.mark.parametrize(
    ("kind", "came"),
    [
        ("xlnet", r"\[12, 2, 32\]"),  # the sequence before the batch
        ("prophetnet", r"\[2, 36, 32\]"),  # two predicting streams after the main one
        ("cpmant", r"\[2, 16, 32\]"),  # tokens of a prompt of its own
        ("qwen4_exp_text", r"\[2, 12, 128\]"),  # four streams in one row
    ],
)
def test_rows_that_are_not_one_for_each_token(kind: str, came: str) -> None:
    lm = tiny(kind)
    for site in ("mlp_out", "resid_pre", "resid_post"):
        with pytest.raises(UsageError, match=f"`site` {site} does not exist in .* {came}") as error:
            resolve_site(lm, 1, site)
    said = str(error.value)
    if "such as " in said:
        point = resolve_site(lm, 1, said.partition("such as ")[2])
        assert run_to(lm, [point], input_ids=IDS)[point.key].shape == (2, 20, 32)
    else:
        assert said.endswith("; give another model")


def test_two_streams_are_not_one() -> None:
    lm = tiny("reformer")
    with pytest.raises(UsageError, match="they pass 2 streams of 32 numbers for each token"):
        resolve_site(lm, 1)


def test_blocks_that_run_again(fresh_lm: Shared) -> None:
    lm = fresh_lm("llama")
    lm.blocks[2] = lm.blocks[1]
    for site in ("resid_post", "attn_out"):
        message = r"block 1 of .* runs 2 times in one pass.*: choose `layer` 0, 3"
        with pytest.raises(UsageError, match=message):
            resolve_site(lm, 1, site)
    with pytest.raises(UsageError, match="mlp of .* runs 2 times in one pass.* another module"):
        resolve_site(lm, 1, "model.layers.1.mlp")
    assert resolve_site(lm, 3).module is lm.blocks[3]


def test_blocks_that_do_not_run_without_an_image() -> None:
    lm = tiny("mllama")
    with pytest.raises(UsageError, match="block 2 of mllama does not run .*: choose `layer` 0-1"):
        resolve_site(lm, 2)
    assert resolve_site(lm, 1).module is lm.blocks[1]


@pytest.mark.parametrize("blocks", ["transformer.attentions", "transformer.ffns"])
def test_a_list_of_parts_is_no_list_of_blocks(blocks: str) -> None:
    lm = tiny("xlm", blocks)
    with pytest.raises(UsageError, match=f"`blocks` {blocks} are no blocks of xlm: what one"):
        resolve_site(lm, 1)


def test_a_model_that_does_not_run_on_text_alone() -> None:
    lm = tiny("gemma4_unified_assistant")
    with pytest.raises(UsageError, match=r"cannot be read: a pass over a few tokens failed \(KeyE"):
        resolve_site(lm, 1)


def test_rows_without_a_batch_are_refused_before_anything_is_read() -> None:
    lm = tiny("opt")
    with pytest.raises(
        UsageError, match=r"fc2 of opt passes a tensor of shape \[24, 32\] for 2 te"
    ):
        resolve_site(lm, 1, "model.decoder.layers.{layer}.fc2")
    point = resolve_site(lm, 1, "model.decoder.layers.1.self_attn.q_proj.input")
    assert run_to(lm, [point], input_ids=IDS)[point.key].shape == (2, 20, 32)


def test_what_was_freed_is_not_looked_at(fresh_lm: Shared) -> None:
    lm = fresh_lm("llama")
    lm.keep_only(1)
    point = resolve_site(lm, 1)
    assert run_to(lm, [point], input_ids=IDS)[point.key].shape == (2, 20, 32)
    assert resolve_site(lm, 3).module is lm.blocks[3]


def test_one_pass_tells_about_all_blocks(fresh_lm: Shared) -> None:
    lm = fresh_lm("llama")
    passes: list[int] = []
    lm.text_model.register_forward_pre_hook(lambda *_: passes.append(1))
    with hooked(HookPoint(0, "resid_post", lm.blocks[0], "", "output"), lambda h: passes.append(2)):
        for layer in (0, 3, -1):
            resolve_site(lm, layer)
    # Hooks of others are not part of the model, and do not fire.
    assert passes == []


def test_a_module_is_looked_at_once(fresh_lm: Shared) -> None:
    lm = fresh_lm("llama")
    first = resolve_site(lm, 1, "model.layers.1.mlp.act_fn")
    lm.text_model.forward = lambda **_: pytest.fail("another pass")  # type: ignore[method-assign]
    assert resolve_site(lm, 1, "model.layers.1.mlp.act_fn").module is first.module


@pytest.mark.parametrize("kind", ["bert", "roformer", "git", "xmod"])
def test_encoders_that_are_decoders_take_token_ids(kind: str) -> None:
    lm = tiny(kind)
    point = resolve_site(lm, 1)
    with torch.inference_mode():
        rows = run_to(lm, [point], input_ids=IDS)[point.key]
        # Causal: what comes later changes nothing.
        shorter = run_to(lm, [point], input_ids=IDS[:, :9])[point.key]
    assert rows.shape == (2, 20, 32)
    torch.testing.assert_close(rows[:, :9], shorter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "path"), [("longcat_flash", "model.layers"), ("gemma3n_text", "model.layers")]
)
def test_blocks_are_found_where_numbers_mislead(kind: str, path: str) -> None:
    assert tiny(kind).blocks_path == path


def test_a_config_of_several_widths_is_refused() -> None:
    for blocks in (None, "model.decoder.layers"):
        with pytest.raises(UserError, match="BltConfig says no hidden_size: .* another model"):
            tiny("blt", blocks)


def test_an_edit_keeps_the_names_of_what_a_module_gives(shared_lm: Shared) -> None:
    for kind, path in (("llama", "model"), ("reformer", "reformer.encoder.layers.1")):
        lm = shared_lm(kind) if kind == "llama" else tiny(kind)
        point = HookPoint(1, path, lm.model.get_submodule(path), path, "output")
        with torch.inference_mode():
            before = lm.model(IDS, use_cache=False).logits
            with hooked(point, lambda h: h * 2):
                after = lm.model(IDS, use_cache=False).logits
        assert not torch.equal(before, after)
