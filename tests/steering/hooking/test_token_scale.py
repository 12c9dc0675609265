"""Plans on SAEs that normalise each token, against the slow way: encode the normalised token, edit
the latents, decode, undo the normalisation, and put back what the SAE did not reconstruct."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.sae_file import SAE, SAESpec, load_sae, save_sae
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.evaluation.controls import random_plan, with_directions
from saesteer.steering.exchange.conversion import check_export
from saesteer.steering.hooking.arrangement import ByRow
from saesteer.steering.hooking.edits import EditPositions, make_edit
from saesteer.steering.hooking.hook import steer
from saesteer.steering.hooking.latent_values import needs_sae, with_gate
from saesteer.steering.plans.from_sae import make_plan
from saesteer.steering.plans.plan import Plan, PlannedLatent
from saesteer.steering.plans.plan_file import load_plan, save_plan

WIDTH, D_SAE = 32, 24
NORMS = ["layer_norm", "constant_norm_rescale"]
ARCHITECTURES = ["standard", "jumprelu", "gated", "topk", "abstopk", "matching_pursuit"]
IDS = (3, 11, 17)
VALUES: dict[str, tuple[float | None, ...]] = {
    "add": (1.5, -0.5, 2.0),
    "set": (0.7, 0.0, 2.0),
    "min": (0.7, 0.1, 2.0),
    "max": (-0.5, 0.0, 0.5),
    "scale": (0.5, 2.0, 0.0),
    "ablate": (None, None, None),
}


def make_sae(folder: Path, norm: str, architecture: str = "standard", **changes: Any) -> SAE:
    """b_dec, thresholds and decoder rows of all lengths; a mean that is not 0."""
    random = torch.Generator().manual_seed(4)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    spec = SAESpec(
        architecture=architecture, d_model=WIDTH, d_sae=D_SAE, normalize_activations=norm,
        k=9 if architecture in ("topk", "abstopk") else None, apply_b_dec_to_input=True,
        hook_name="blocks.1.hook_resid_post", **changes,
    )  # fmt: skip
    more: dict[str, Tensor] = {}
    if architecture == "jumprelu":
        more["threshold"] = noise(D_SAE).abs()
    if architecture == "gated":
        more = {"b_mag": noise(D_SAE), "r_mag": noise(D_SAE) / 3}
    W_enc, b_enc, W_dec = noise(WIDTH, D_SAE), noise(D_SAE), 2 * noise(D_SAE, WIDTH)
    if architecture == "matching_pursuit":
        W_dec = W_dec / W_dec.norm(dim=1, keepdim=True)
        W_enc, b_enc = W_dec.T.contiguous(), torch.zeros(D_SAE)
    sae = SAE(spec=spec, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=noise(WIDTH), **more)
    save_sae(folder, sae.spec, **sae.tensors())
    return load_sae(folder)


def tokens() -> Tensor:
    """Residuals of very different lengths and means."""
    random = torch.Generator().manual_seed(6)
    lengths = torch.tensor([0.3, 1.0, 7.0, 40.0, 300.0])
    rows = torch.randn(2, 5, WIDTH, generator=random) + torch.randn(2, 5, 1, generator=random)
    return rows * lengths[None, :, None]


def the_slow_way(sae: SAE, x: Tensor, method: str, doses: list[float]) -> Tensor:
    sae = sae.to(dtype="float64")
    x = x.double()
    f = sae.encode(x)
    error = x - sae.decode(f, x)
    new = f.clone()
    for latent, dose in zip(IDS, doses, strict=True):
        now = f[..., latent]
        new[..., latent] = {
            "add": now + dose,
            "set": torch.full_like(now, dose),
            "min": now.clamp(min=dose),
            "max": now.clamp(max=dose),
            "scale": now * dose,
            "ablate": torch.zeros_like(now),
        }[method]
    return sae.decode(new, x) + error


def plan_of(lm: LanguageModel, sae: SAE, method: str, **changes: Any) -> Plan:
    latents = [PlannedLatent(id=i, value=v) for i, v in zip(IDS, VALUES[method], strict=True)]
    return make_plan(lm, sae, latents, method=method, scope="all", **changes)


def edited(plan: Plan, x: Tensor, sae: SAE | None = None) -> Tensor:
    return x + make_edit(plan.parts, sae).delta(x, EditPositions())


@pytest.mark.parametrize("method", VALUES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("norm", NORMS)
def test_the_edit_is_that_of_the_slow_way(
    tmp_path: Path, lm: LanguageModel, norm: str, architecture: str, method: str
) -> None:
    sae = make_sae(tmp_path / "sae", norm, architecture)
    plan = plan_of(lm, sae, method)
    expected = the_slow_way(sae, tokens(), method, plan.doses())
    save_plan(plan, tmp_path / "plan")
    found = edited(load_plan(tmp_path / "plan"), tokens())
    # Relative to each token: float32 latents against float64 ones.
    size = tokens().norm(dim=-1, keepdim=True)
    assert float(((found - expected) / size).abs().max()) < 1e-4
    assert float(((found - tokens()) / size).abs().max()) > 1e-2, "something was edited"


@pytest.mark.parametrize("norm", NORMS)
def test_latents_that_stand_alone_need_no_sae(tmp_path: Path, lm: LanguageModel, norm: str) -> None:
    sae = make_sae(tmp_path / "sae", norm, "jumprelu")
    plan = with_gate(plan_of(lm, sae, "set"), "5 > 0.1", sae)
    save_plan(plan, tmp_path / "plan")
    x = tokens()
    with_sae = edited(plan, x, sae)
    shutil.rmtree(tmp_path / "sae")
    alone = load_plan(tmp_path / "plan")
    assert not needs_sae(alone.part) and alone.sae.normalize_activations == norm
    assert torch.allclose(edited(alone, x), with_sae, rtol=1e-4, atol=1e-4)
    ids = torch.arange(5, 14)[None]
    with torch.no_grad(), steer(lm, alone) as report:
        lm.model(input_ids=ids)
    assert report.tokens_touched + report.tokens_gated_off > 0


@pytest.mark.parametrize("norm", NORMS)
def test_the_hook_scales_each_token(tmp_path: Path, lm: LanguageModel, norm: str) -> None:
    """By a forward pass: what is added differs by the token's scale, and by that alone."""
    sae = make_sae(tmp_path / "sae", norm)
    plan = plan_of(lm, sae, "add")
    block = lm.model.model.layers[1]
    seen: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).clone())

    ids = torch.arange(5, 14)[None]
    with torch.no_grad():
        handle = block.register_forward_hook(keep)
        lm.model(input_ids=ids)
        handle.remove()
        with steer(lm, plan, include_first=True):
            handle = block.register_forward_hook(keep)
            lm.model(input_ids=ids)
            handle.remove()
    expected = the_slow_way(sae, seen[0].float(), "add", plan.doses())
    assert torch.allclose(seen[1].double(), expected, rtol=1e-4, atol=1e-4)


def test_rows_of_both_kinds(tmp_path: Path, lm: LanguageModel) -> None:
    """Adding plans of one batch share a hook only where they scale alike."""
    plans = [plan_of(lm, make_sae(tmp_path / norm, norm), "add") for norm in [*NORMS, "none"]]
    ids = torch.arange(5, 14).repeat(3, 1)
    together = []
    with torch.no_grad():
        with steer(lm, ByRow(plans)):
            together = list(lm.model(input_ids=ids).logits)
        for plan, logits in zip(plans, together, strict=True):
            with steer(lm, plan):
                alone = lm.model(input_ids=ids).logits[0]
            # A batch of rows is multiplied in other blocks than one row.
            assert torch.allclose(logits, alone, atol=1e-4)


def test_controls_keep_the_length_of_each_token(tmp_path: Path, lm: LanguageModel) -> None:
    sae = make_sae(tmp_path / "sae", "layer_norm")
    plan = plan_of(lm, sae, "add")
    x = tokens()
    wanted = (edited(plan, x) - x).norm(dim=-1)
    other = with_directions(plan, torch.eye(1, WIDTH), [0], "mean difference", [1.0])
    for control in (random_plan(plan, sae), random_plan(plan, None), other):
        assert torch.allclose((edited(control, x) - x).norm(dim=-1), wanted, rtol=1e-3)


def test_a_share_of_the_length_stays_one(tmp_path: Path, lm: LanguageModel) -> None:
    sae = make_sae(tmp_path / "sae", "layer_norm")
    plan = plan_of(lm, sae, "add", unit="rel", scale=0.25)
    x = tokens()
    share = (edited(plan, x) - x).norm(dim=-1) / x.norm(dim=-1)
    assert torch.allclose(share, torch.full_like(share, 0.25), atol=1e-4)


def test_what_cannot_be_said(tmp_path: Path, lm: LanguageModel) -> None:
    sae = make_sae(tmp_path / "sae", "layer_norm")
    plan = plan_of(lm, sae, "add")
    with pytest.raises(UserError, match="scales each token.*`method` add"):
        check_export(plan, "gguf", as_scope="all")
    with pytest.raises(UserError, match="sae.normalize_activations is 'x'"):
        dataclasses.replace(plan.sae, normalize_activations="x")
    metadata = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    odd = make_sae(tmp_path / "odd", "constant_norm_rescale", metadata=metadata)
    with pytest.raises(UserError, match="by its length without its mean"):
        plan_of(lm, odd, "add")


@pytest.mark.parametrize("norm", NORMS)
def test_a_vector_on_plain_states_has_their_scale(
    norm: str, lm: LanguageModel, tmp_path: Path
) -> None:
    sae = make_sae(tmp_path, norm)
    latents = [PlannedLatent(id=i, value=1.0) for i in IDS]
    plan = make_plan(lm, sae, latents, method="set-to", scope="last-prompt")
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        plain = lm.model(ids, output_hidden_states=True).hidden_states[2][0, -1]
        with steer(lm, plan.with_changes(layer=1)):
            found = lm.model(ids, output_hidden_states=True).hidden_states[2][0, -1]
    scale = plain.std() if norm == "layer_norm" else plain.norm() / WIDTH**0.5
    wanted = plain + scale * sae.W_dec[list(IDS)].sum(dim=0)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
