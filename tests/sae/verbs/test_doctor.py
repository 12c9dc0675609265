"""The doctor passes on models that work and says what is wrong with those that do not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.model.hooks import HookPoint, resolve_site
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.verbs import doctor as diagnosis
from saesteer.sae.verbs.doctor import doctor

pytestmark = pytest.mark.usefixtures("short_dry_run")

Shared = Callable[..., LanguageModel]

READS = "The hook reads what the model itself reports"
SUMS = "What the block adds up to proves the site"
STORED = "A row that is stored is the row that a whole pass computes"
NULL = "A null edit changes no logit"
UNIT = "A unit edit moves the site by the unit vector, and the logits, and nothing below"
CACHE = "Cached and uncached passes agree at the site"
HEADS = "The attention heads of the block are read and written one by one"
GONE = "No hook is left behind"
FITS = "The SAE reconstructs this site"

SMALL: dict[str, Any] = {"context": 32, "batch_size": 2}


def failures(found: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["detail"] for check in found["checks"] if not check["ok"]}


@pytest.mark.parametrize(
    ("family", "layer", "site"),
    [
        ("llama", None, None), ("llama", -1, "resid_post"), ("llama", 0, "resid_pre"),
        ("gpt2", 1, "mlp_out"), ("gpt_neox", 2, None), ("phi", -1, "attn_out"),
        ("gemma2", 3, "resid_mid"), ("gemma3", 0, None), ("mixtral", 1, None), ("olmo2", 3, None),
        ("qwen3", 2, "model.layers.{layer}.mlp.down_proj"), ("mistral", 3, None),
        ("gemma2", 2, "z"), ("gemma3_multimodal", 1, None), ("llava", -1, None),
    ],
)  # fmt: skip
def test_all_is_well(family: str, layer: int | None, site: str | None, shared_lm: Shared) -> None:
    lm = shared_lm(family)
    found = doctor(lm, layer=layer, site=site, tokens=1000, **SMALL)
    assert failures(found) == {}
    told = {check["name"]: check["detail"] for check in found["checks"]}
    assert list(told) == [READS, SUMS, STORED, NULL, UNIT, CACHE, HEADS, GONE]
    if site in ("attn_out", "mlp_out", "resid_mid"):
        assert "off by 0, allowed" in told[SUMS]
    assert "heads of width" in told[HEADS] and "moves it alone" in told[HEADS]
    assert "allowed" in told[CACHE] and "asked for" in told[UNIT]
    assert found["layer"] == (2 if layer is None else layer % 4)
    assert found["model"]["hash"] == lm.fingerprint
    for hooks in (lm.blocks[0]._forward_hooks, lm.blocks[3]._forward_pre_hooks):
        assert not hooks or family, "the library may keep hooks of its own"


def test_predictions(shared_lm: Shared) -> None:
    lm = shared_lm()
    found = doctor(lm, tokens=5000, **SMALL)["predictions"]
    assert found["shard_bytes"] == 5000 * (32 * 4 + 4)
    assert found["model_bytes"] == sum(4 * p.numel() for p in lm.model.parameters())
    # Weights and two moments in float32, of 256 latents, and what a step holds.
    assert found["d_sae"] == 256
    assert found["training_bytes"] > 12 * (2 * 256 * 32 + 256 + 32)
    assert found["training_buffer_bytes"] > 2500 * 32 * 4
    assert found["harvest_memory_bytes"] > found["model_bytes"]
    speed, seconds = found["harvest_tokens_per_second"], found["harvest_seconds"]
    assert speed > 0 and seconds == pytest.approx(5000 / speed, abs=0.1)


# --- models and hooks that do not work


def check(lm: LanguageModel, point: HookPoint) -> dict[str, str]:
    ids = diagnosis._sample_ids(lm)
    checks = [diagnosis._run_check(check, lm, point, ids) for check in diagnosis._CHECKS]
    return failures({"checks": checks})


def test_a_hook_on_the_wrong_block(shared_lm: Shared) -> None:
    lm = shared_lm()
    right = resolve_site(lm, 1)
    for layer, says in ((2, "is off by up to"), (0, "blocks below the edit changed")):
        wrong = HookPoint(1, "resid_post", lm.blocks[layer], right.module_path, "output")
        found = check(lm, wrong)
        assert "differs from hidden_states[2]" in found[READS]
        assert says in found[UNIT]


def test_a_hook_on_the_wrong_side(shared_lm: Shared) -> None:
    lm = shared_lm()
    wrong = HookPoint(1, "resid_post", lm.blocks[1], "model.layers.1", "input")
    found = check(lm, wrong)
    assert READS in found and UNIT in found


def test_a_hook_that_is_not_heard(shared_lm: Shared) -> None:
    """A module beside the stream: what is written there never reaches the logits."""
    lm = shared_lm()

    class Beside(torch.nn.Module):
        def forward(self, h: Tensor) -> Tensor:
            return h.clone()

    beside = Beside()
    handle = lm.blocks[1].register_forward_hook(lambda m, args, out: beside(out) is None or None)
    try:
        found = check(lm, HookPoint(1, "beside", beside, "beside", "output"))
    finally:
        handle.remove()
    assert "the logits did not change" in found[UNIT]


def test_a_model_that_writes_to_what_hooks_hand_out(fresh_lm: Shared) -> None:
    lm = fresh_lm()

    def restless(module: Any, args: Any, output: Tensor) -> Tensor:
        return output + torch.rand(()) / 10

    lm.blocks[2].register_forward_hook(restless)
    found = check(lm, resolve_site(lm, 3))
    assert "logits moved by up to" in found[NULL]
    assert "blocks below the edit changed" in found[UNIT]


def test_a_cache_that_disagrees(fresh_lm: Shared) -> None:
    lm = fresh_lm()

    def shorter(module: Any, args: Any, output: Tensor) -> Tensor | None:
        return 2 * output if output.shape[1] == 1 else None

    lm.blocks[0].register_forward_hook(shorter)
    assert "the last position differs by up to" in check(lm, resolve_site(lm, 1))[CACHE]


def test_a_hook_that_stays(shared_lm: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = shared_lm()
    point = resolve_site(lm, 1)

    class Stuck:
        def __enter__(self) -> None:
            self.handle = point.module.register_forward_hook(lambda m, args, out: None)

        def __exit__(self, *error: Any) -> None:
            handles.append(self.handle)

    handles: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(diagnosis, "hooked", lambda *args: Stuck())
        found = check(lm, point)
    for handle in handles:
        handle.remove()
    assert "hooks are still on model.layers.1" in found[GONE]


def test_a_model_that_breaks_is_a_finding(fresh_lm: Shared) -> None:
    lm = fresh_lm()

    def broken(module: Any, args: Any, output: Tensor) -> None:
        raise IndexError("of its own")

    lm.blocks[3].register_forward_hook(broken)
    found = check(lm, resolve_site(lm, 1))
    assert found[NULL] == "IndexError: of its own"


# --- SAEs


def sae_for(lm: LanguageModel, layer: int, b_dec: Tensor) -> SAE:
    """Gives back what it gets, moved by what `b_dec` was when it was made."""
    both = torch.cat([torch.eye(32), -torch.eye(32)])
    spec = SAESpec(
        architecture="standard", d_model=32, d_sae=64, hook_name=f"blocks.{layer}.hook_resid_post"
    )
    return SAE(spec, 0.5 * both.T, torch.zeros(64), both, b_dec, source="S")


def test_an_sae_at_its_own_layer(shared_lm: Shared) -> None:
    lm = shared_lm()
    found = doctor(lm, sae=sae_for(lm, 1, torch.zeros(32)), **SMALL)
    assert failures(found) == {} and found["layer"] == 1
    last = found["checks"][-1]
    assert last["name"] == FITS and last["detail"].startswith("FVU 0.2")


def test_an_sae_from_elsewhere(shared_lm: Shared) -> None:
    lm = shared_lm()
    # Its b_dec is the mean activation of somewhere far off.
    found = doctor(lm, sae=sae_for(lm, 2, torch.full((32,), 20.0)), **SMALL)
    assert list(failures(found)) == [FITS]
    with pytest.raises(UserError, match="`layer` 3 conflicts with `sae` S, which reads layer 2"):
        doctor(lm, sae=sae_for(lm, 2, torch.zeros(32)), layer=3, **SMALL)
