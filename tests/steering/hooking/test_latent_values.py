"""Latents are read as the SAE itself encodes them, whatever decides which of them count."""

from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.hooking.hook import steer
from saesteer.steering.hooking.latent_values import edit_reader, gate_reader, needs_sae, with_gate
from saesteer.steering.plans.from_sae import make_plan
from saesteer.steering.plans.plan import Plan, PlannedLatent

pytestmark = pytest.mark.usefixtures("endless")

IDS = (3, 7, 11, 20)


def sae_of(architecture: str, **fields: Any) -> SAE:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    counted = {"topk": 4, "abstopk": 4, "groupmax": 6}
    return SAE(
        spec=SAESpec(
            architecture=architecture,  # type: ignore[arg-type]
            d_model=32, d_sae=24, k=counted.get(architecture),
            hook_name="blocks.1.hook_resid_post", **fields,
        ),
        W_enc=noise(32, 24) / 32**0.5,
        b_enc=noise(24) * 0.3,
        W_dec=noise(24, 32) / 32**0.5,
        b_dec=noise(32) * 0.3,
        threshold=noise(24).abs() if architecture == "jumprelu" else None,
        b_mag=noise(24) * 0.3 if architecture == "gated" else None,
        r_mag=noise(24) * 0.1 if architecture == "gated" else None,
        source="somewhere",
        sha256=architecture,
    )  # fmt: skip


def plan_of(lm: LanguageModel, sae: SAE, **fields: Any) -> Plan:
    latents = [PlannedLatent(id=i, mu=1.5, sigma=0.4, max=4.0) for i in IDS]
    return make_plan(lm, sae, latents, **fields)


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("standard", {}),
        ("jumprelu", {"apply_b_dec_to_input": True}),
        ("gated", {}),
        ("topk", {}),
        ("topk", {"apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": True}),
        ("abstopk", {}),
        ("groupmax", {}),
    ],
)
def test_readers_give_what_the_sae_encodes(
    architecture: str, fields: dict[str, Any], lm: LanguageModel
) -> None:
    sae = sae_of(architecture, **fields)
    h = torch.randn(200, 32, generator=torch.Generator().manual_seed(1)) * 2
    wanted = sae.encode(h)
    # Some of the latents count at some tokens and not at others.
    assert bool((wanted[:, list(IDS)] != 0).any()) and bool((wanted[:, list(IDS)] == 0).any())
    plan = with_gate(plan_of(lm, sae, method="set"), "20 > 1 & 5 > 0.5", sae)
    alone = architecture in ("standard", "jumprelu")
    assert needs_sae(plan.part) != alone
    # Columns by themselves and the whole encoder differ by float32 rounding.
    for given in [sae, *([None] if alone else [])]:
        found = edit_reader(plan.part, given).read(h)
        torch.testing.assert_close(found, wanted[:, list(IDS)], rtol=1e-5, atol=1e-5)
        found = gate_reader(plan.part, given).read(h)
        torch.testing.assert_close(found, wanted[:, [20, 5]], rtol=1e-5, atol=1e-5)
    assert edit_reader(plan.part, sae).read(h[:0]).shape == (0, len(IDS))


def test_a_positive_latent_that_is_not_among_the_k_largest_is_off(lm: LanguageModel) -> None:
    sae = sae_of("topk")
    h = torch.randn(50, 32, generator=torch.Generator().manual_seed(2))
    q, acts = sae.pre_acts(h)[:, list(IDS)], sae.encode(h)[:, list(IDS)]
    assert bool(((q > 0) & (acts == 0)).any())
    assert torch.equal(edit_reader(plan_of(lm, sae, method="set").part, sae).read(h), acts)


@pytest.mark.parametrize("value", [2.0, 0.0, -1.0])
def test_ties_at_the_last_place_go_to_the_lowest_index(value: float, lm: LanguageModel) -> None:
    """Two latents above all others; the rest of the k places for six that are equal."""
    sae = sae_of("topk")
    sae.W_enc.zero_()
    sae.b_enc.fill_(-5.0)
    sae.b_enc[[0, 1]] = 9.0
    sae.b_enc[[3, 5, 7, 11, 20, 22]] = value
    h = torch.randn(5, 32)
    wanted = [[max(value, 0.0), 0.0, 0.0, 0.0]] * 5  # 3 and 5 take the two places
    assert sae.encode(h)[:, list(IDS)].tolist() == wanted
    assert edit_reader(plan_of(lm, sae, method="set").part, sae).read(h).tolist() == wanted


def test_nan_in_a_residual_is_read_as_the_sae_reads_it(lm: LanguageModel) -> None:
    sae = sae_of("topk")
    h = torch.randn(4, 32, generator=torch.Generator().manual_seed(3))
    sae.b_enc[2] = torch.nan
    wanted = sae.encode(h)[:, list(IDS)]
    assert bool((wanted != 0).any())
    assert torch.equal(edit_reader(plan_of(lm, sae, method="set").part, sae).read(h), wanted)


@pytest.mark.parametrize("method", ["set", "min", "scale", "ablate"])
def test_an_edit_of_a_topk_sae_moves_the_residual_as_its_decoder_would(
    method: str, lm: LanguageModel
) -> None:
    """Encode, change the chosen latents, decode: the difference is what is added, to the error."""
    sae = sae_of("topk")
    scale = 2.5 if method == "scale" else 1.0
    plan = plan_of(lm, sae, method=method, scale=scale)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> None:
        seen.append(output.clone())

    block = lm.blocks[1]
    before = block.register_forward_hook(keep)
    with torch.no_grad(), steer(lm, plan, scope="all", include_first=True, sae=sae):
        after = block.register_forward_hook(keep)
        lm.model(input_ids=ids)
    before.remove()
    after.remove()
    h, moved = seen[0][0], seen[1][0]
    acts = sae.encode(h)
    new, dose = acts.clone(), plan.doses()[0]
    own = acts[:, list(IDS)]
    new[:, list(IDS)] = {
        "set": torch.full_like(own, dose),
        "min": own.clamp(min=dose),
        "scale": own * dose,
        "ablate": torch.zeros_like(own),
    }[method]
    wanted = h + sae.decode(new) - sae.decode(acts)
    torch.testing.assert_close(moved, wanted, rtol=1e-4, atol=1e-4)
