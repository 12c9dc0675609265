"""The head tap equals each family's own attention, and an edit of one head reaches that head."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.model.attention import head_tap, heads, out_projection
from saesteer.sae.model.hooks import capture, hooked, resolve_site, run_to, sae_hook_point
from saesteer.sae.model.language_model import LanguageModel, uncompiled, wrap_model

from ...conftest import FAMILIES

Make = Callable[..., tuple[Any, Any]]
IDS = torch.arange(40).reshape(2, 20) * 11 % 250 + 5


def logits(lm: LanguageModel, ids: Tensor = IDS, **more: Any) -> Tensor:
    found: Tensor = uncompiled(lm.model)(input_ids=ids, **more).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tap_is_the_models_own_attention(tiny_lm: Make, family: str) -> None:
    lm = wrap_model(*tiny_lm(family))
    config = lm.text_model.config
    before, seen = config._attn_implementation, {}
    padding = torch.ones_like(IDS)
    padding[1, 12:] = 0
    own = logits(lm, attention_mask=padding, use_cache=False)
    layout = heads(lm)
    with head_tap(lm) as tap, capture([resolve_site(lm, 2, "z")]) as entered:
        for site in ("q", "k", "v", "scores", "pattern", "z"):
            tap.edits[2, site] = lambda values, site=site: seen.update({site: values.clone()})
        ours = logits(lm, attention_mask=padding, use_cache=False)
    assert config._attn_implementation == before
    real = padding.bool()
    # Float32 sums in another order, on logits of a few units.
    torch.testing.assert_close(ours[real], own[real], rtol=0, atol=2e-5)
    n, width = layout.n_heads, layout.d_head
    assert seen["q"].shape == seen["k"].shape == seen["v"].shape == (2, n, 20, width)
    assert seen["pattern"].shape == seen["scores"].shape == (2, n, 20, 20)
    assert torch.equal(entered[2, "z"], seen["z"].flatten(-2))
    again = (seen["pattern"] @ seen["v"]).transpose(1, 2)
    torch.testing.assert_close(again, seen["z"], rtol=0, atol=1e-6)
    assert (seen["pattern"].triu(1) == 0).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_tap_gives_float64_references(tiny_lm: Make, family: str) -> None:
    model, tokenizer = tiny_lm(family)
    single = logits(wrap_model(model, tokenizer), use_cache=False)
    lm = wrap_model(model.double(), tokenizer)
    with head_tap(lm) as tap:
        kinds = []
        tap.edits[0, "pattern"] = lambda p: kinds.append(p.dtype)
        double = logits(lm, use_cache=False)
    assert kinds == [torch.float64]
    torch.testing.assert_close(double.float(), single, rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_neox"])
def test_null_edits_leave_bits_and_one_head_moves_alone(tiny_lm: Make, family: str) -> None:
    lm = wrap_model(*tiny_lm(family))
    point = resolve_site(lm, 1, "z")
    with head_tap(lm) as tap, capture([point]) as entered:
        plain = logits(lm)
        plain_z = entered[point.key]
        for site in ("q", "k", "v", "scores", "pattern", "z"):
            tap.edits[1, site] = lambda values: values.clone()
        assert torch.equal(logits(lm), plain)

        def one_head(z: Tensor) -> Tensor:
            z = z.clone()
            z[:, 7, 3] += 1
            return z

        tap.edits = {(1, "z"): one_head}
        moved = logits(lm)
    change = (entered[point.key] - plain_z).unflatten(-1, (4, 8))
    assert change[:, 7, 3].abs().min() > 0.9
    change[:, 7, 3] = 0
    assert (change == 0).all()
    assert torch.equal(moved[:, :7], plain[:, :7]) and not torch.equal(moved[:, 7:], plain[:, 7:])


def test_an_exception_restores_the_attention(tiny_lm: Make) -> None:
    lm = wrap_model(*tiny_lm())
    before = lm.text_model.config._attn_implementation
    with pytest.raises(RuntimeError, match="stop"):
        with head_tap(lm):
            raise RuntimeError("stop")
    assert lm.text_model.config._attn_implementation == before


def test_grouped_keys_and_values_are_edited_head_by_head(tiny_lm: Make) -> None:
    lm = wrap_model(*tiny_lm("llama"))
    assert (heads(lm).n_heads, heads(lm).n_kv_heads, heads(lm).width) == (4, 2, 32)
    seen: list[Tensor] = []

    def drop(v: Tensor) -> Tensor:
        v = v.clone()
        v[:, 1] = 0
        return v

    with head_tap(lm) as tap:
        tap.edits[0, "v"] = drop
        tap.edits[0, "z"] = seen.append  # type: ignore[assignment]
        logits(lm)
    z = seen[0]
    assert (z[:, :, 1] == 0).all() and (z[:, :, 0] != 0).any()  # heads 0 and 1 share their values


def other(name: str, **settings: Any) -> LanguageModel:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, name)(
        vocab_size=264, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **settings
    )
    return wrap_model(transformers.AutoModelForCausalLM.from_config(config).float(), None)


def test_attention_that_is_not_plain_is_refused_and_keeps_z() -> None:
    lm = other("BloomConfig")
    with pytest.raises(UsageError, match=r"heads .* cannot be told apart \(BloomModel .* z, attn"):
        heads(lm)
    point = resolve_site(lm, 1, "z")
    assert point.module_path.endswith("self_attention.dense") and point.side == "input"
    assert run_to(lm, [point], input_ids=IDS)[point.key].shape == (2, 20, 32)
    sinks = other(
        "GptOssConfig", head_dim=8, num_key_value_heads=2, intermediate_size=32,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    with torch.no_grad():
        for block in sinks.blocks:
            block.self_attn.sinks.fill_(3.0)
        sinks.model.lm_head.weight.mul_(50)
        for name, weight in sinks.model.named_parameters():
            if "o_proj" in name and weight.dim() == 2:
                weight.mul_(50)
    with pytest.raises(UsageError, match="plain attention moves its logits"):
        heads(sinks)


def reader_of_heads(width: int) -> SAE:
    spec = SAESpec(architecture="standard", d_model=width, d_sae=8, reshape_activations="hook_z",
                   hook_name="blocks.1.attn.hook_z")  # fmt: skip
    return SAE(spec, torch.randn(width, 8), torch.zeros(8), torch.randn(8, width),
               torch.zeros(width))  # fmt: skip


def test_an_sae_of_head_outputs_is_opened(tiny_lm: Make) -> None:
    lm = wrap_model(*tiny_lm("gemma2"))
    assert out_projection(lm, 1) == "self_attn.o_proj"
    sae = reader_of_heads(32)
    point = sae_hook_point(sae, lm)
    assert point.name == "blocks.1.attn.hook_z" and point.side == "input"
    with hooked(point, lambda z: sae.decode(sae.encode(z))):
        assert not torch.equal(logits(lm), logits(wrap_model(*tiny_lm("gemma2"))))
    with pytest.raises(UserError, match="heads of total width 32"):
        sae_hook_point(reader_of_heads(16), lm)
