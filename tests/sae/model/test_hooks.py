"""Sites are where they say on every family; hooks read, write, stop and go away."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.model.hooks import (
    SITES,
    HookPoint,
    StopForward,
    capture,
    hooked,
    layer_index,
    resolve_site,
    run_to,
    sae_hook_point,
)
from saesteer.sae.model.language_model import LanguageModel, wrap_model

Shared = Callable[..., LanguageModel]

PARALLEL = ("gpt_neox", "phi")
"""Attention and MLP read the same input: there is no residual between them."""

FAMILIES = (
    "llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi", "olmo2", "mistral",
    "mixtral", "gemma3_multimodal", "llava",
)  # fmt: skip

IDS = torch.arange(10, 34).reshape(2, 12) * 7 % 390 + 5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_of_every_family(family: str, shared_lm: Shared) -> None:
    lm = shared_lm(family)
    sites = [site for site in SITES if not (family in PARALLEL and site == "resid_mid")]
    points = [resolve_site(lm, layer, site) for layer in range(lm.n_layers) for site in sites]
    with torch.inference_mode(), capture(points) as seen:
        states = lm.text_model(
            input_ids=IDS, output_hidden_states=True, use_cache=False
        ).hidden_states

    def at(layer: int, site: str) -> Tensor:
        return seen[layer, site]

    for layer in range(lm.n_layers):
        assert torch.equal(at(layer, "resid_pre"), states[layer])
        last = layer == lm.n_layers - 1
        # The library reports the last block's output after the final norm only.
        reported = lm.final_norm(at(layer, "resid_post")) if last else at(layer, "resid_post")
        assert torch.equal(reported, states[layer + 1])
        assert not torch.equal(at(layer, "resid_post"), at(layer, "resid_pre"))
        if family in PARALLEL:
            parts = [at(layer, site) for site in ("resid_pre", "attn_out", "mlp_out")]
            # Three numbers added in another order than the block does.
            torch.testing.assert_close(sum(parts), at(layer, "resid_post"), rtol=1e-5, atol=1e-5)
        else:
            middle = at(layer, "resid_mid")
            assert torch.equal(at(layer, "resid_pre") + at(layer, "attn_out"), middle)
            assert torch.equal(middle + at(layer, "mlp_out"), at(layer, "resid_post"))


@pytest.mark.parametrize("family", PARALLEL)
def test_a_site_that_a_block_does_not_have(family: str, shared_lm: Shared) -> None:
    with pytest.raises(
        UsageError, match="`site` resid_mid does not exist in the .* use resid_post"
    ):
        resolve_site(shared_lm(family), 1, "resid_mid")


def test_gpt_neox_with_blocks_in_sequence_has_a_middle(shared_lm: Shared) -> None:
    import transformers

    config = transformers.GPTNeoXConfig(
        vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, use_parallel_residual=False,
    )  # fmt: skip
    torch.manual_seed(0)
    lm = wrap_model(transformers.GPTNeoXForCausalLM(config), shared_lm().tokenizer)
    points = [resolve_site(lm, 1, site) for site in SITES]
    with torch.inference_mode(), capture(points) as seen:
        lm.text_model(input_ids=IDS)
    middle = seen[1, "resid_pre"] + seen[1, "attn_out"]
    torch.testing.assert_close(seen[1, "resid_mid"], middle)
    torch.testing.assert_close(seen[1, "resid_mid"] + seen[1, "mlp_out"], seen[1, "resid_post"])


def test_hook_names(shared_lm: Shared) -> None:
    lm = shared_lm()
    point = resolve_site(lm, -1, "resid_mid")
    assert (point.name, point.key) == ("blocks.3.hook_resid_mid", (3, "resid_mid"))
    assert point.module_path == "model.layers.3.post_attention_layernorm"
    assert resolve_site(lm, 2).module_path == "model.layers.2"
    path = resolve_site(lm, 2, "model.layers.{layer}.mlp.down_proj")
    assert path.name == "model.layers.2.mlp.down_proj" == path.module_path
    assert path.module is lm.blocks[2].mlp.down_proj


def test_layers_out_of_range(shared_lm: Shared) -> None:
    lm = shared_lm()
    assert [layer_index(lm, layer) for layer in (0, 3, -1, -4)] == [0, 3, 3, 0]
    for layer in (4, -5):
        with pytest.raises(
            UsageError, match=rf"`layer` {layer} is out of range: tiny-llama has 4 blocks, 0\.\.3"
        ):
            resolve_site(lm, layer)


@pytest.mark.parametrize("site", ["resid", "model.layers.9.mlp", "", "model.layers.{}"])
def test_unknown_sites(site: str, shared_lm: Shared) -> None:
    with pytest.raises(UsageError, match="`site` must be one of resid_post, .* or a module path"):
        resolve_site(shared_lm(), 0, site)


def test_a_module_path_must_lie_in_the_layer_asked(shared_lm: Shared) -> None:
    lm = shared_lm()
    assert resolve_site(lm, 1, "model.layers.1.mlp").key == (1, "model.layers.1.mlp")
    with pytest.raises(UsageError, match="lies in block 1, but `layer` is 2"):
        resolve_site(lm, 2, "model.layers.1.mlp")
    with pytest.raises(UsageError, match="lies in block 1, but `layer` is 2"):
        resolve_site(lm, 2, "model.layers.1")


def test_a_module_that_text_never_reaches(shared_lm: Shared) -> None:
    lm = shared_lm()
    with pytest.raises(UsageError, match="`site` lm_head is never reached.*inside model.layers"):
        run_to(lm, [resolve_site(lm, 0, "lm_head")], input_ids=IDS)


# --- hooked


class _Block(nn.Module):
    """Takes its input by position or name, gives it back as a tensor or in a tuple."""

    def __init__(self, tuple_output: bool) -> None:
        super().__init__()
        self.tuple_output = tuple_output

    def forward(self, hidden_states: Tensor, scale: float = 1.0) -> Any:
        out = hidden_states * scale
        return (out, "cache") if self.tuple_output else out


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("tuple_output", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_inputs_and_outputs_of_every_form(side: str, tuple_output: bool, by_name: bool) -> None:
    block = _Block(tuple_output)
    point = HookPoint(0, "resid_pre", block, "block", side)
    x = torch.arange(6.0).reshape(1, 2, 3)

    def run() -> Tensor:
        out = block(hidden_states=x, scale=2.0) if by_name else block(x, 2.0)
        assert not tuple_output or out[1] == "cache"
        return out[0] if tuple_output else out

    with hooked(point, lambda h: h + 1):
        assert torch.equal(run(), 2 * (x + 1) if side == "input" else 2 * x + 1)
    with hooked(point, lambda h: None):
        assert torch.equal(run(), 2 * x)
    assert torch.equal(run(), 2 * x)


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_reach_the_logits_and_leave_no_trace(family: str, shared_lm: Shared) -> None:
    lm = shared_lm(family)

    def logits() -> Tensor:
        with torch.inference_mode():
            return lm.model(input_ids=IDS).logits

    plain = logits()
    for site in ("resid_post", "resid_pre", "attn_out", "mlp_out"):
        point = resolve_site(lm, 2, site)
        handed: list[Tensor] = []

        def edit(h: Tensor, handed: list[Tensor] = handed) -> Tensor:
            handed.append(h)
            handed.append(h.clone())
            return h + 1

        for nothing in (lambda h: None, lambda h: h.clone()):
            with hooked(point, nothing):
                assert torch.equal(logits(), plain)
        with hooked(point, edit):
            assert not torch.equal(logits(), plain)
        assert torch.equal(*handed), "the tensor that was handed out was written to"
        with pytest.raises(RuntimeError, match="inside"), hooked(point, edit):
            raise RuntimeError("inside")
        with pytest.raises(ZeroDivisionError), hooked(point, lambda h: h / (1 // 0)):
            logits()
        assert torch.equal(logits(), plain)


def test_an_edit_changes_this_block_on_and_nothing_below(shared_lm: Shared) -> None:
    lm = shared_lm()
    points = [resolve_site(lm, layer) for layer in range(4)]
    with torch.inference_mode():
        before = run_to(lm, points, input_ids=IDS)
        with hooked(points[2], lambda h: h + 1):
            after = run_to(lm, points, input_ids=IDS)
    assert [torch.equal(before[p.key], after[p.key]) for p in points] == [True, True, False, False]
    assert torch.equal(after[2, "resid_post"], before[2, "resid_post"] + 1)


# --- stopping


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_multimodal"])
def test_nothing_runs_beyond_the_last_point(family: str, shared_lm: Shared) -> None:
    lm = shared_lm(family)
    ran: list[str] = []
    modules = {**{f"block {i}": block for i, block in enumerate(lm.blocks)}, "head": lm.unembed}
    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: ran.append(name))
        for name, module in modules.items()
    ]
    try:
        with torch.inference_mode():
            points = [resolve_site(lm, 1), resolve_site(lm, 0, "attn_out")]
            seen = run_to(lm, points, input_ids=IDS)
            assert ran == ["block 0", "block 1"]
            assert set(seen) == {(1, "resid_post"), (0, "attn_out")}
            run_to(lm, [resolve_site(lm, 2, "resid_pre")], input_ids=IDS)
            assert ran[2:] == ["block 0", "block 1", "block 2"]
    finally:
        for handle in handles:
            handle.remove()
    # A pass that was cut short leaves the model as it was.
    with torch.inference_mode():
        states = lm.text_model(input_ids=IDS, output_hidden_states=True).hidden_states
        assert len(states) == 5 and torch.equal(states[2], seen[1, "resid_post"])
        lm.model(input_ids=IDS)


def test_stop_forward_belongs_to_the_caller(shared_lm: Shared) -> None:
    lm = shared_lm()
    with pytest.raises(StopForward), capture([resolve_site(lm, 0)], stop=True):
        lm.text_model(input_ids=IDS)
    with capture([resolve_site(lm, 0)]) as seen:
        lm.text_model(input_ids=IDS[:, :3])
        lm.text_model(input_ids=IDS)
    assert seen[0, "resid_post"].shape == (2, 12, 32), "the latest pass is kept"
    assert not seen[0, "resid_post"].requires_grad


# --- the hook point of an SAE


def sae_for(lm: LanguageModel, hook_name: str = "blocks.1.hook_resid_post", **changes: Any) -> SAE:
    d_model = changes.pop("d_model", lm.d_model)
    saesteer = {"model": {"hash": changes.pop("hash", lm.fingerprint)}}
    spec = SAESpec(
        architecture="standard", d_model=d_model, d_sae=2, hook_name=hook_name,
        model_name="tiny", metadata={"saesteer": saesteer},
    )  # fmt: skip
    zeros = torch.zeros
    return SAE(spec, zeros(d_model, 2), zeros(2), zeros(2, d_model), zeros(d_model), source="S")


def test_an_sae_names_its_own_place(shared_lm: Shared) -> None:
    lm = shared_lm()
    assert sae_hook_point(sae_for(lm), lm).key == (1, "resid_post")
    assert sae_hook_point(sae_for(lm), lm, layer=-3, site="resid_post").key == (1, "resid_post")
    assert sae_hook_point(sae_for(lm, "blocks.2.hook_mlp_out"), lm).key == (2, "mlp_out")
    assert sae_hook_point(sae_for(lm, ""), lm, layer=-1).key == (3, "resid_post")
    path = sae_for(lm, "model.layers.2.mlp.down_proj")
    asked = "model.layers.{layer}.mlp.down_proj"
    for point in (sae_hook_point(path, lm), sae_hook_point(path, lm, layer=2, site=asked)):
        assert point.module is lm.blocks[2].mlp.down_proj


def test_an_sae_that_does_not_fit(shared_lm: Shared) -> None:
    lm = shared_lm()
    cases: list[tuple[SAE, dict[str, Any], str]] = [
        (sae_for(lm, d_model=16), {}, "`sae` S has d_model 16, `model` tiny-llama has 32"),
        (sae_for(lm), {"layer": 2}, "`layer` 2 conflicts with `sae` S, which reads layer 1"),
        (sae_for(lm), {"layer": 9}, "`layer` 9 is out of range"),
        (sae_for(lm, "blocks.7.hook_resid_post"), {}, "`sae` S reads layer 7, .* has 4 blocks"),
        (sae_for(lm), {"site": "mlp_out"}, "`site` mlp_out conflicts with `sae` S.*resid_post"),
        (sae_for(lm, ""), {}, "`sae` S names no layer: give `layer`"),
        (sae_for(lm, hash="0" * 16), {}, "was trained on tiny with weights 0{16}.*or `force`"),
    ]
    for sae, asked, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            sae_hook_point(sae, lm, **asked)
        # What the flags say is wrong usage; an SAE of something else is not.
        flags = "layer" in asked or "site" in asked or "names no layer" in message
        assert isinstance(caught.value, UsageError) == flags
        assert "\n" not in str(caught.value)
    assert sae_hook_point(sae_for(lm, hash="0" * 16), lm, force=True).layer == 1


def test_an_sae_of_sae_lens_knows_no_fingerprint(shared_lm: Shared, tmp_path: Path) -> None:
    lm = shared_lm()
    sae = sae_for(lm)
    bare = SAESpec(architecture="standard", d_model=32, d_sae=2, hook_name=sae.spec.hook_name)
    assert sae_hook_point(SAE(bare, *list(sae.tensors().values())), lm).layer == 1
