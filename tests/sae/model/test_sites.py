"""Sites inside blocks are what the block adds up, whatever modules are called; or refused."""

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

Shared = Callable[..., LanguageModel]
IDS = torch.arange(40).reshape(2, 20) * 11 % 250 + 5
INNER = ("attn_out", "mlp_out", "resid_mid")

TINY: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
PLAIN = {k: v for k, v in TINY.items() if k not in ("num_key_value_heads", "intermediate_size")}
EXPERTS = {
    "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
    "moe_intermediate_size": 32, "num_dense_layers": 1,
}  # fmt: skip
# What each adds, and the sites that its blocks have.
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "residual inside the module, with dropout": ("BloomConfig", PLAIN, INNER),
    "residual inside the MLP": (
        "MptConfig",
        {"vocab_size": 264, "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 128},
        INNER,
    ),
    "norms before and after": ("Glm4Config", {**TINY, "head_dim": 8}, INNER),
    "norms after, of two more names": ("AfmoeConfig", {**TINY, **EXPERTS}, INNER),
    "a sum in place": ("FalconConfig", {**PLAIN, "multi_query": True}, ("attn_out", "mlp_out")),
    "parallel without a flag": ("CohereConfig", TINY, ("attn_out", "mlp_out")),
    "scaled sums": ("GraniteConfig", {**TINY, "residual_multiplier": 0.22}, ("resid_mid",)),
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


def _causal_families() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def try_family(kind: str) -> dict[str, str] | str:
    """What became of each inner site of a tiny random model of one kind; or why there is none."""
    import transformers

    settings = {**TINY, **EXPERTS, "n_routed_experts": 4, "n_shared_experts": 1}
    try:
        name = type(transformers.AutoConfig.for_model(kind)).__name__
        with torch.device("meta"):
            config = getattr(transformers, name)(**settings)
            model = transformers.AutoModelForCausalLM.from_config(config)
        if sum(parameter.numel() for parameter in model.parameters()) > 2_000_000:
            return "these settings do not make it small"
        lm = tiny(name, settings)
        with torch.inference_mode():
            run_to(lm, [resolve_site(lm, 1)], input_ids=IDS)
    except Exception as error:
        return type(error).__name__ + ": " + " ".join(str(error).split())[:80]
    done = {}
    for site in INNER:
        try:
            done[site] = find_site(lm, 1, site).path
        except UserError as error:
            done[site] = "refused: " + str(error)
    return done


@pytest.mark.slow
@pytest.mark.parametrize("kind", _causal_families())
def test_every_causal_family_of_transformers(kind: str) -> None:
    done = try_family(kind)
    if isinstance(done, str):
        pytest.skip(f"no tiny {kind} was made: {done}")
    assert set(done) == set(INNER)
    # Either proved by a sum, or refused with what to do instead.
    assert all(not said.startswith("refused") or "use resid_post" in said for said in done.values())


def test_weights_that_are_no_numbers_are_named(fresh_lm: Shared) -> None:
    lm = fresh_lm("llama")
    with torch.no_grad():
        lm.model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="gave NaN or infinite activations at layer 1"):
        find_site(lm, 1, "mlp_out")
