"""What an edit did to its latents, against residuals written out one by one."""

import dataclasses
from typing import Any

import pytest
import torch

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.hooking.latent_changes import read_back
from saesteer.steering.hooking.latent_values import with_gate

from ..whole_row import make_sae, plan_of

pytestmark = pytest.mark.usefixtures("endless")

TEXTS = ["The statement assigns a value to a name.", "yield it"]


def test_an_orthonormal_linear_sae_changes_by_what_is_asked(lm: LanguageModel) -> None:
    sae = make_sae(lm)
    basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
    sae.W_dec[:], sae.W_enc[:] = basis[:24], basis[:24].T
    sae.b_enc.fill_(50.0)  # every latent is on: nothing is cut
    plan = plan_of(lm, sae, 3, 7)
    for change in read_back(lm, plan, TEXTS, sae=sae, max_new_tokens=4):
        assert change.asked == pytest.approx(plan.doses()[plan.ids.index(change.id)])
        assert change.measured == pytest.approx(change.asked, rel=1e-4)
        assert change.share == pytest.approx(1.0, rel=1e-4)
        assert (change.tokens, change.on_before, change.on_after) == (8, 1.0, 1.0)


def asked(method: str, dose: float, a: float) -> float:
    return {
        "add": dose,
        "add-keep-norm": dose,
        "set": dose - a,
        "min": max(a, dose) - a,
        "scale": dose * a - a,
        "ablate": -a,
    }[method]


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"unit": "rel", "scale": 0.5}, {"method": "add-keep-norm"}, {"method": "set"},
     {"method": "min"}, {"method": "scale", "scale": 3.0}, {"method": "ablate"}],
    ids=str,
)  # fmt: skip
def test_changes_are_those_of_each_residual(
    fields: dict[str, Any], architecture: str, lm: LanguageModel
) -> None:
    from saesteer.sae.model.generation import generate
    from saesteer.sae.text.prompts import encode_prompt
    from saesteer.steering.hooking.hook import steer

    sae = make_sae(lm, architecture)
    plan = with_gate(plan_of(lm, sae, 11, 19, **fields), "5 > 0.2", sae)
    found = read_back(lm, plan, TEXTS, sae=sae, max_new_tokens=5)
    befores: list[torch.Tensor] = []
    afters: list[torch.Tensor] = []
    block = lm.blocks[1]
    one = block.register_forward_hook(lambda m, a, out: befores.append(out.clone()))
    with steer(lm, plan, sae=sae):
        two = block.register_forward_hook(lambda m, a, out: afters.append(out.clone()))
        prompts = [encode_prompt(lm, text, chat=True) for text in TEXTS]
        generate(lm, prompts, max_new_tokens=5)
    one.remove()
    two.remove()
    rows = [
        (h, g)
        for before, after in zip(befores, afters, strict=True)
        for h, g in zip(before.flatten(0, 1), after.flatten(0, 1), strict=True)
        if not torch.equal(h, g)
    ]
    for place, change in enumerate(found):
        old = [float(sae.encode(h[None])[0, change.id]) for h, _ in rows]
        new = [float(sae.encode(g[None])[0, change.id]) for _, g in rows]
        assert change.tokens == len(rows) > 0
        assert change.before == pytest.approx(sum(old) / len(old), rel=1e-4, abs=1e-5)
        assert change.after == pytest.approx(sum(new) / len(new), rel=1e-4, abs=1e-5)
        dose = plan.doses()[place]
        total = torch.tensor(plan.doses()) @ plan.directions
        if plan.unit == "rel":
            wanted = [dose * plan.scale * float(h.norm() / total.norm()) for h, _ in rows]
        else:
            wanted = [asked(plan.method, dose, a) for a in old]
        assert change.asked == pytest.approx(sum(wanted) / len(wanted), rel=1e-4, abs=1e-5)


def test_projection_asks_for_no_change_and_a_plan_may_do_without_its_sae(
    lm: LanguageModel,
) -> None:
    sae = make_sae(lm)
    changes = read_back(lm, plan_of(lm, sae, 3, method="project"), TEXTS, max_new_tokens=3)
    assert changes[0].asked is None and changes[0].share is None and changes[0].tokens == 6


def test_what_cannot_be_read_is_an_error(lm: LanguageModel) -> None:
    plan = plan_of(lm, make_sae(lm, "topk"))
    with pytest.raises(UserError, match="a TopK SAE needs the SAE itself.*give `sae`"):
        read_back(lm, plan, TEXTS)
    with pytest.raises(UsageError, match="no text to read latents on"):
        read_back(lm, dataclasses.replace(plan), [])
