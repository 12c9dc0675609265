"""Grids over pairs: known effects of the hand-built model, and one line for what cannot work."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.mechanisms.config import PatchConfig
from saesteer.mechanisms.data.pairs import Pair
from saesteer.mechanisms.patching import clock
from saesteer.mechanisms.patching.grid import patch
from saesteer.sae.model.language_model import LanguageModel, wrap_model

Make = Callable[..., tuple[Any, Any]]


def effects(result: Any, site: str) -> dict[tuple[int, int, str], float]:
    return {
        (row["layer"], row["head"], row["at"]): row["effect"]
        for row in result.summary
        if row["site"] == site
    }


def test_the_hand_built_circuit_is_found(toy: LanguageModel, scenes: list[Pair]) -> None:
    config = PatchConfig(sites=("z", "k", "q", "v"), at=("last", "object", "label"))
    result = patch(toy, scenes, config)
    z, k, v = (effects(result, site) for site in ("z", "k", "v"))
    assert z[1, 1, "last"] == z[0, 0, "object"] == pytest.approx(-10, abs=1e-3)
    # The key of the object names its label; the value is the object itself.
    assert k[1, 1, "object"] == pytest.approx(-10, abs=1e-3)
    assert v[1, 1, "object"] == pytest.approx(-10, abs=1e-3)
    assert v[0, 0, "label"] == pytest.approx(-10, abs=1e-3)
    others = [(0, 1), (0, 2), (1, 0), (1, 2)]
    for found in (z, k, v, effects(result, "q")):
        assert all(found[layer, head, at] == 0 for layer, head in others for at in config.at)
    assert z[0, 0, "last"] == z[1, 1, "object"] == 0
    assert result.total == pytest.approx(-10, abs=1e-3)
    assert "largest" in repr(result) and "-10.000" in repr(result)


def test_denoising_brings_the_answer_back(toy: LanguageModel, scenes: list[Pair]) -> None:
    config = PatchConfig(
        sites=("resid_post",), at=("last",), direction="denoise", metric="accuracy"
    )
    result = patch(toy, scenes, config)
    found = {row["layer"]: row["effect"] for row in result.summary}
    assert found == {0: 0.0, 1: 1.0} and result.summary[1]["share"] == 1.0


def test_equal_runs_have_no_effect_at_all(tiny_lm: Make) -> None:
    lm = wrap_model(*tiny_lm())
    text = "The name of the class is"
    pairs = [Pair(text, text, " in", group=str(i)) for i in range(2)]
    result = patch(lm, pairs, PatchConfig(sites=("resid_post", "z", "pattern"), at=("all",)))
    assert (result.effects == 0).all() and result.metric == "logprob"
    assert result.warnings() == [
        "2 groups are fewer than 8: no intervals; give more pairs of other groups"
    ]
    assert len(result.tokens) == len(set(cell.at for cell in result.cells))


def test_tokens_before_the_first_difference_have_no_effect(tiny_lm: Make) -> None:
    lm = wrap_model(*tiny_lm("gpt2"))
    pair = Pair("The name of the class is", "The name of the class or", " in", " not")
    result = patch(lm, [pair], PatchConfig(at=("all",), check_chance=False))
    found = effects(result, "resid_post")
    last = len(result.tokens) - 1
    assert all((value != 0) == (at == f"token:{last}") for (_, _, at), value in found.items())
    assert found[3, None, f"token:{last}"] == pytest.approx(result.total, abs=1e-5)


def test_a_shortcut_comes_with_its_agreement(tiny_lm: Make) -> None:
    lm = wrap_model(*tiny_lm())
    pair = Pair("The name of the class is", "The name of the type is", " in", " not")
    config = PatchConfig(
        sites=("z", "resid_post"), fast="atp", verify=4, checks=4, check_chance=False
    )
    result = patch(lm, [pair], config)
    exact = patch(lm, [pair], PatchConfig(sites=config.sites, check_chance=False))
    known = ~np.isnan(result.effects[0])
    assert known.sum() == 8 and result.agreement is not None and result.agreement.nodes == 8
    np.testing.assert_allclose(result.effects[0, known], exact.effects[0, known], atol=1e-5)
    assert result.fast is not None and not np.isnan(result.fast).any()
    assert [row["exact"] for row in result.summary] == known.tolist()
    shown = [row["effect"] for row in result.summary if not row["exact"]]
    np.testing.assert_allclose(shown, result.fast[0, ~known])


def test_dtype_of_a_name_is_float32(tiny_model_dir: Callable[..., Any]) -> None:
    pair = Pair("The name of the class is", "The name of the type is", " in")
    result = patch(str(tiny_model_dir("llama")), [pair], PatchConfig(layers=(3,)))
    assert result.model["dtype"] == "float32"


PAIR = Pair("The name of the class is", "The name of a class is not", " in", " of",
            {"noun": ((18, 23), (16, 21))})  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sites": ("resid",)}, "`sites` must be of resid_pre, .* got 'resid'"),
        ({"sites": ("z", "z")}, "`sites` names one of z, z twice"),
        ({"sites": ()}, "`sites` must be of .* got none"),
        ({"at": ()}, "`at` names no position"),
        ({"at": ("nowhere",)}, "`at` must be one of first, last, noun, .* or all, got 'nowhere'"),
        ({"at": ("all",)}, "`at` all needs runs of one length, got "),
        ({"layers": (4,)}, "`layer` 4 is out of range: .* has 4 blocks"),
        ({"sites": ("z",), "heads": (4,)}, "`heads` 4 .* 4 blocks of 4 query heads and 2 of keys"),
        ({"heads": (1,)}, "`heads` belongs to sites of heads"),
        ({"sites": ("pattern",)}, "a row of pattern fits only the same token"),
        ({"direction": "both"}, "`direction` must be of noise, denoise, got 'both'"),
        ({"metric": "loss"}, "`metric` must be of logit-diff"),
        ({"fast": "magic"}, "`fast` must be of atp"),
        ({"fast": "ig"}, "`fast` ig needs both runs of a pair to have one length"),
        ({"fast": "atp", "metric": "rr"}, "`fast` atp needs a metric with a gradient, got rr"),
        ({"fast": "atp", "verify": 1, "checks": 0}, "never shown alone"),
        ({"verify": -1}, "`verify` must be 0 or more"),
        ({"ig_steps": 0}, "`ig_steps` must be at least 1"),
        ({"budget_minutes": 0.0}, "`budget_minutes` must be above 0"),
    ],
)
def test_what_cannot_work(tiny_lm: Make, settings: dict[str, Any], says: str) -> None:
    lm = wrap_model(*tiny_lm())
    with pytest.raises(UsageError, match=says) as caught:
        patch(lm, [PAIR], PatchConfig(check_chance=False, **settings))
    assert "\n" not in str(caught.value)


def test_a_site_that_a_family_lacks(tiny_lm: Make) -> None:
    with pytest.raises(UsageError, match="`site` resid_mid does not exist in the GPTNeoX"):
        patch(wrap_model(*tiny_lm("gpt_neox")), [PAIR], PatchConfig(sites=("resid_mid",)))


def test_a_model_at_chance_has_nothing_to_explain(tiny_lm: Make) -> None:
    lm = wrap_model(*tiny_lm())
    pairs = [Pair("The name of the class is", "A name", a, b) for a, b in ((" in", " of"),
             (" of", " in"))] * 6  # fmt: skip
    says = r"nothing to explain: accuracy 0.50 \[0.25, 0.75\] .* on 12 clean prompts, chance 0.50"
    with pytest.raises(UserError, match=says):
        patch(lm, pairs, PatchConfig(sites=("z",)))
    shown = [Pair("The name", "A name", " in", chance=0.2)] * 12
    with pytest.raises(UserError, match="nothing to explain: accuracy 0.00 .* chance 0.20"):
        patch(lm, shown, PatchConfig(sites=("z",)))


def test_a_grid_over_the_budget_is_refused_after_three_batches(
    tiny_lm: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(10_000))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(next(ticks)))
    lm = wrap_model(*tiny_lm())
    pairs = [Pair("The name of the class is", "A type of a name was", " in", " of")] * 20
    config = PatchConfig(sites=("resid_post",), at=("first", "last"), check_chance=False)
    says = "this grid takes about [0-9]+ minutes, over `budget_minutes` 0.1: give fewer layers"
    with pytest.raises(UsageError, match=says):
        patch(lm, pairs, dataclasses.replace(config, budget_minutes=0.1))
    assert torch.is_grad_enabled()
