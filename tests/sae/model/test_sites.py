"""Sites inside blocks are what the block adds up, whatever modules are called; or refused."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.checkpoints.errors import NonFiniteError, UsageError, UserError
from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.model.hooks import capture, hooked, resolve_site, run_to, sae_hook_point
from saesteer.sae.model.language_model import LanguageModel, wrap_model
from saesteer.sae.model.sites import find_site

from .family_sites import INNER, PAGE, build, causal_families, page_line, try_family
from .tiny_families import COMMON, EXPERTS, NOT_BUILT

Shared = Callable[..., LanguageModel]
IDS = torch.arange(40).reshape(2, 20) * 11 % 250 + 5

PLAIN = {k: v for k, v in COMMON.items() if k not in ("num_key_value_heads", "intermediate_size")}
# What each adds, and the sites that its blocks have.
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "residual inside the module, with dropout": ("BloomConfig", PLAIN, INNER),
    "residual inside the MLP": (
        "MptConfig",
        {"vocab_size": 264, "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 128},
        INNER,
    ),
    "norms before and after": ("Glm4Config", {**COMMON, "head_dim": 8}, INNER),
    "norms after, of two more names": ("AfmoeConfig", {**COMMON, **EXPERTS}, INNER),
    "a sum in place": ("FalconConfig", {**PLAIN, "multi_query": True}, ("attn_out", "mlp_out")),
    "parallel without a flag": ("CohereConfig", COMMON, ("attn_out", "mlp_out")),
    "scaled sums": ("GraniteConfig", {**COMMON, "residual_multiplier": 0.22}, ("resid_mid",)),
    "an MLP without batches": (
        "OPTConfig", {**PLAIN, "ffn_dim": 64, "word_embed_proj_dim": 32}, ("attn_out",),
    ),
    "neither attention nor MLP": (
        "MambaConfig",
        {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4},
        (),
    ),
}  # fmt: skip


def tiny(name: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32) -> LanguageModel:
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return wrap_model(model.eval().to(dtype), None, name)


def relative(found: Tensor, expected: Tensor, added: Tensor) -> float:
    return float((found - expected).norm() / added.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sums_hold_or_the_site_is_refused(family: str) -> None:
    name, settings, expected = FAMILIES[family]
    lm = tiny(name, settings)
    points = [resolve_site(lm, 1, site) for site in ("resid_pre", "resid_post")]
    for site in INNER:
        if site in expected:
            points.append(resolve_site(lm, 1, site))
        else:
            with pytest.raises(UsageError, match=f"`site` {site} does not exist in the"):
                resolve_site(lm, 1, site)
    with torch.inference_mode(), capture(points) as seen:
        lm.text_model(input_ids=IDS, use_cache=False)
    at = {site: values for (_, site), values in seen.items()}
    assert all(values.shape == (2, 20, 32) for values in at.values())
    if {"attn_out", "resid_mid"} <= set(at):
        sum_ = at["resid_pre"] + at["attn_out"]
        assert relative(sum_, at["resid_mid"], at["attn_out"]) < 1e-4
    if {"mlp_out", "resid_mid"} <= set(at):
        sum_ = at["resid_mid"] + at["mlp_out"]
        assert relative(sum_, at["resid_post"], at["mlp_out"]) < 1e-4
    elif {"attn_out", "mlp_out"} <= set(at):
        sum_ = at["resid_pre"] + at["attn_out"] + at["mlp_out"]
        assert relative(sum_, at["resid_post"], at["mlp_out"]) < 1e-4


def test_the_factor_of_a_scaled_sum_is_named() -> None:
    lm = tiny("GraniteConfig", FAMILIES["scaled sums"][1])
    with pytest.raises(UsageError, match=r"self_attn is multiplied by 0.22 before it is added"):
        resolve_site(lm, 1, "attn_out")


def test_sixteen_bits_find_the_same_modules() -> None:
    for name, settings, expected in FAMILIES.values():
        exact, rounded = tiny(name, settings), tiny(name, settings, torch.bfloat16)
        for site in expected:
            found = find_site(rounded, 1, site)
            assert found.path == find_site(exact, 1, site).path
            assert found.off <= found.allowed


def test_edits_under_way_are_no_part_of_the_model(fresh_lm: Shared) -> None:
    lm = fresh_lm("llama")
    fired: list[Tensor] = []
    with hooked(resolve_site(lm, 0), lambda h: fired.append(h)):
        assert resolve_site(lm, 1, "attn_out").module_path == "model.layers.1.self_attn"
        assert not fired
        run_to(lm, [resolve_site(lm, 1)], input_ids=IDS)
    assert len(fired) == 1


def test_what_was_captured_does_not_change_later() -> None:
    name, settings, _ = FAMILIES["a sum in place"]
    lm = tiny(name, settings)
    first, second = (resolve_site(lm, layer, "mlp_out") for layer in (0, 1))
    with torch.inference_mode():
        alone = run_to(lm, [first], input_ids=IDS)[first.key]
        beside = run_to(lm, [first, second], input_ids=IDS)[first.key]
    assert torch.equal(alone, beside)


def test_streams_side_by_side_are_refused_in_words(fresh_lm: Shared) -> None:
    lm = fresh_lm("llama")
    point = resolve_site(lm, 1)
    with pytest.raises(UsageError, match=r"passes a tensor of shape \[2, 2, 20, 32\]"):
        with hooked(point, lambda h: None):
            point.module.forward = lambda h, **kwargs: torch.stack([h, h])
            lm.text_model(input_ids=IDS, use_cache=False)


def sae_at(hook_name: str) -> SAE:
    spec = SAESpec(architecture="topk", d_model=32, d_sae=8, k=2, hook_name=hook_name)
    return SAE(
        spec=spec, W_enc=torch.zeros(32, 8), W_dec=torch.zeros(8, 32), b_enc=torch.zeros(8),
        b_dec=torch.zeros(32),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("named", "path", "side"),
    [
        ("layers.1.mlp", "model.layers.1.mlp", "output"),
        ("h.1.mlp", "model.layers.1.mlp", "output"),
        ("mlp_out_layer_1", "model.layers.1.mlp", "output"),
        ("attention_out_layer_1", "model.layers.1.self_attn", "output"),
        ("resid_post_layer_1", "model.layers.1", "output"),
        ("model.layers.1.self_attn.o_proj.input", "model.layers.1.self_attn.o_proj", "input"),
    ],
)
def test_sites_in_other_tools_words_open(
    named: str, path: str, side: str, shared_lm: Shared
) -> None:
    lm = shared_lm("llama")
    point = sae_hook_point(sae_at(named), lm)
    assert (point.layer, point.module_path, point.side) == (1, path, side)
    # The place of that module by its other names is the same place.
    for site in ("mlp_out", "model.layers.1.mlp"):
        if path.endswith(".mlp"):
            assert sae_hook_point(sae_at(named), lm, site=site).module is point.module
        else:
            with pytest.raises(UserError, match="conflicts with"):
                sae_hook_point(sae_at(named), lm, site=site)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("zamba2", "the sum with linear goes into other modules, and only mamba_decoder.mamba is"),
        ("longcat_flash", "there is another attention after self_attn.0: self_attn.1"),
    ],
)
def test_a_middle_beside_the_stream_is_refused(kind: str, reason: str) -> None:
    lm = wrap_model(build(kind), None, kind)
    for site in INNER:
        with pytest.raises(UsageError, match=reason):
            resolve_site(lm, 1, site)


def test_what_is_added_beside_the_mlp_is_named() -> None:
    lm = wrap_model(build("gemma4_text"), None, "gemma4_text")
    with pytest.raises(UsageError, match="the block adds post_per_layer_input_norm after it"):
        resolve_site(lm, 1, "mlp_out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", causal_families())
def test_every_causal_family_of_transformers(kind: str) -> None:
    page = PAGE.read_text()
    if kind == "gemma3n" and all(map(importlib.util.find_spec, ("timm", "PIL"))):
        assert try_family(kind).refused  # as its text tower is
    elif kind in NOT_BUILT:
        reason, words = NOT_BUILT[kind]
        with pytest.raises((AttributeError, ImportError), match=words):
            build(kind)
        assert f"| {kind} | {reason} |" in page
    else:
        # Sums, copies and edits hold wherever a site is given; refusals say what works instead.
        line = page_line(kind, try_family(kind))
        assert line in page, "python -m tests.sae.model.family_sites writes the page again"


def test_the_page_names_every_family() -> None:
    import transformers

    page = PAGE.read_text()
    if f"transformers {transformers.__version__.rpartition('.')[0]}" not in page:
        pytest.skip(f"the page is of another version than {transformers.__version__}")
    assert [kind for kind in causal_families() if f"\n| {kind} | " not in page] == []


def test_weights_that_are_no_numbers_are_named(fresh_lm: Shared) -> None:
    lm = fresh_lm("llama")
    with torch.no_grad():
        lm.model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="gave NaN or infinite activations at layer 1"):
        find_site(lm, 1, "mlp_out")
