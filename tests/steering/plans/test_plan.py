"""Plans: doses, latents by hand, the SAE's place and encoder, and the model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.model.language_model import LanguageModel, wrap_model
from saesteer.steering.exchange.conversion import EXPORTS
from saesteer.steering.hooking.latent_values import with_gate
from saesteer.steering.plans.from_sae import (
    encoder_columns,
    make_plan,
    parse_latents,
    plan_from_latents,
)
from saesteer.steering.plans.methods import METHODS, UNITS
from saesteer.steering.plans.plan import Plan

from ..ranked_plans import LATENTS, make_sae, ranked


@pytest.mark.parametrize(
    ("fields", "doses"),
    [
        ({}, [2.0, 1.0]),
        ({"beta": 2.0}, [3.0, 1.5]),
        ({"beta": -1.0, "scale": 2.0}, [3.0, 1.5]),
        ({"scale": -1.0}, [-2.0, -1.0]),
        ({"unit": "sigma", "scale": 3.0}, [1.5, 0.75]),
        ({"unit": "max", "scale": 0.5}, [3.0, 1.5]),
        # Weights; the relative dose itself is the scale.
        ({"unit": "rel", "scale": 0.3, "beta": 2.0}, [3.0, 1.5]),
        ({"method": "set", "scale": 2.0}, [4.0, 2.0]),
        ({"method": "min", "beta": 2.0}, [3.0, 1.5]),
        ({"method": "scale", "scale": 3.0}, [3.0, 3.0]),
        ({"method": "ablate"}, [0.0, 0.0]),
        ({"method": "project"}, [0.0, 0.0]),
    ],
)
def test_doses_of_a_ranked_plan(
    fields: dict[str, Any], doses: list[float], lm: LanguageModel
) -> None:
    assert ranked(lm, **fields).doses() == pytest.approx(doses)


@pytest.mark.parametrize(
    ("fields", "doses"),
    [
        ({}, [1.2, -0.8]),
        ({"scale": 2.0}, [2.4, -1.6]),
        ({"method": "scale", "scale": 2.0}, [2.4, -1.6]),
        ({"method": "max", "scale": 0.5}, [0.6, -0.4]),
        ({"unit": "rel", "scale": 0.4}, [1.2, -0.8]),
    ],
)
def test_doses_of_values_given_by_hand(
    fields: dict[str, Any], doses: list[float], lm: LanguageModel
) -> None:
    plan = plan_from_latents(lm, make_sae(), None, {9: 1.2, 2: -0.8}, **fields)
    assert plan.doses() == pytest.approx(doses)
    assert (plan.layer, plan.site) == (1, "resid_post")


def test_values_in_units_of_a_statistic(lm: LanguageModel) -> None:
    latents = [dataclasses.replace(latent, value=3.0) for latent in LATENTS]
    plan = make_plan(lm, make_sae(), latents, unit="sigma")
    assert plan.doses() == pytest.approx([1.5, 0.75])
    assert dataclasses.replace(plan, unit="max", scale=0.5).doses() == pytest.approx([9.0, 4.5])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "clamp"}, "`method` must be one of add, .*project, got 'clamp'"),
        ({"unit": "std"}, "`unit` must be one of raw, sigma, max, rel, got 'std'"),
        ({"scope": "here"}, "`scope` must be one of"),
        ({"scale": float("nan")}, "`scale` must be a finite number"),
        ({"beta": float("inf")}, "`beta` must be a finite number"),
        ({"unit": "rel", "method": "set"}, "`unit` rel is for `method` add and add-keep-norm"),
        ({"unit": "sigma", "method": "scale"}, "`method` scale takes a factor"),
        ({"unit": "sigma", "beta": 1.0}, "`beta` 1 has no meaning with `unit` sigma"),
        ({"beta": 1.0, "method": "scale", "scale": 2.0}, "`beta` 1 has no meaning"),
        ({"method": "scale"}, "factor of 1 changes nothing"),
        ({"method": "ablate", "scale": 2.0}, "`method` ablate takes no dose: leave out `scale` 2"),
        ({"method": "project", "beta": 1.0}, "takes no dose: leave out `beta` 1"),
        ({"method": "ablate", "unit": "sigma"}, "takes no dose: leave out `unit` sigma"),
    ],
)
def test_doses_that_mean_nothing_are_usage_errors(
    fields: dict[str, Any], message: str, lm: LanguageModel
) -> None:
    with pytest.raises(UsageError, match=message):
        ranked(lm, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0.5}, "`beta` 0.5 needs latents with mu and sigma.*leave `beta` out"),
        ({"unit": "sigma"}, "`unit` sigma needs the sigma of latent 9"),
        ({"unit": "max"}, "`unit` max needs the max of latent 9"),
        ({"method": "ablate"}, "leave out values in `latents`"),
    ],
)
def test_values_by_hand_have_no_statistics(
    fields: dict[str, Any], message: str, lm: LanguageModel
) -> None:
    with pytest.raises(UsageError, match=message):
        plan_from_latents(lm, make_sae(), None, {9: 1.2}, **fields)


def test_a_dose_of_zero_is_an_error_and_a_multiplier_of_zero_is_not(lm: LanguageModel) -> None:
    with pytest.raises(UsageError, match="every dose is 0.*values in `latents`, or `scale`$"):
        plan_from_latents(lm, make_sae(), None, {9: 0.0})
    assert plan_from_latents(lm, make_sae(), None, {9: 1.0}, scale=0.0).doses() == [0.0]
    assert ranked(lm, method="ablate", scale=0.0).scale == 0
    with pytest.raises(UsageError, match="every dose is 0.*change `beta`$"):
        ranked(lm, beta=-4.0)  # both have mu / sigma = 4


@pytest.mark.parametrize("field", ["mu", "sigma"])
def test_a_missing_statistic_is_a_usage_error(field: str, lm: LanguageModel) -> None:
    latents = [dataclasses.replace(LATENTS[0], **{field: None})]
    with pytest.raises(UsageError, match=f"needs the {field} of latent 9"):
        make_plan(lm, make_sae(), latents, beta=1.0)


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 10**6), st.floats(-100, 100), min_size=1, max_size=5))
def test_latents_read_back_as_they_were_written(values: dict[int, float]) -> None:
    assert parse_latents(",".join(f"{i}:{v!r}" for i, v in values.items())) == values


def test_latents_may_be_given_without_values_for_methods_that_take_none(lm: LanguageModel) -> None:
    assert parse_latents("9, 2") == {9: None, 2: None}
    plan = plan_from_latents(lm, make_sae(), None, parse_latents("9,2"), method="ablate")
    assert plan.ids == (9, 2)
    with pytest.raises(UsageError, match="`latents` 9 has no value and `method` add needs one"):
        plan_from_latents(lm, make_sae(), None, parse_latents("9,2"))


@pytest.mark.parametrize("text", ["", "a", "9:", "9:x", "-3:1", "9:1,,2:1", "1.5:2", "9:1:2"])
def test_bad_latents_are_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="`latents` must be ID:VALUE"):
        parse_latents(text)


def test_a_latent_named_twice_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="names latent 9 twice"):
        parse_latents("9:1,9:2")


def test_a_latent_out_of_range_is_a_usage_error(lm: LanguageModel) -> None:
    with pytest.raises(UsageError, match=r"latent 20 is out of range: .*20 latents, 0..19"):
        plan_from_latents(lm, make_sae(), None, {20: 1.0})


def test_a_value_that_is_not_finite_is_a_usage_error(lm: LanguageModel) -> None:
    with pytest.raises(UsageError, match="value of latent 9 must be finite, got nan"):
        plan_from_latents(lm, make_sae(), None, parse_latents("9:nan"))


def test_layer_and_site_come_from_the_sae(lm: LanguageModel) -> None:
    values = {9: 1.0}
    other = make_sae(hook="blocks.2.hook_mlp_out")
    plan = plan_from_latents(lm, other, None, values)
    assert (plan.layer, plan.site) == (2, "mlp_out")
    assert plan_from_latents(lm, other, -2, values).layer == 2
    with pytest.raises(UsageError, match="`layer` 1 conflicts with `sae` folder.*reads layer 2"):
        plan_from_latents(lm, other, 1, values)
    with pytest.raises(UsageError, match="`site` resid_post conflicts .*reads mlp_out"):
        plan_from_latents(lm, other, None, values, site="resid_post")
    silent = make_sae(hook="")
    assert plan_from_latents(lm, silent, -1, values).layer == 3
    with pytest.raises(UsageError, match="names no layer: give `layer`"):
        plan_from_latents(lm, silent, None, values)
    with pytest.raises(UsageError, match="`layer` 7 is out of range"):
        plan_from_latents(lm, silent, 7, values)


def test_an_sae_for_another_model_is_an_error(lm: LanguageModel) -> None:
    with pytest.raises(UserError, match="has d_model 16, `model` tiny has 32"):
        plan_from_latents(lm, make_sae(d_model=16), None, {9: 1.0})
    with pytest.raises(UserError, match="reads layer 9, `model` tiny has 4 blocks"):
        plan_from_latents(lm, make_sae(hook="blocks.9.hook_resid_post"), None, {9: 1.0})


def test_directions_are_the_files_own_rows(lm: LanguageModel) -> None:
    sae = make_sae().to(dtype=torch.bfloat16)
    plan = plan_from_latents(lm, sae, None, {9: 1.0, 2: 1.0})
    assert plan.directions.dtype == torch.bfloat16
    assert torch.equal(plan.directions, sae.W_dec[[9, 2]])


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
@pytest.mark.parametrize("fields", [
    {},
    {"apply_b_dec_to_input": True},
    {"metadata": {"model_from_pretrained_kwargs": {"center_writing_weights": True}}},
    {
        "apply_b_dec_to_input": True,
        "metadata": {"model_from_pretrained_kwargs": {"center_writing_weights": True}},
    },
], ids=["as is", "minus b_dec", "centered", "both"])  # fmt: skip
def test_encoder_columns_read_what_the_sae_reads(architecture: str, fields: dict[str, Any]) -> None:
    sae = make_sae(architecture, **fields)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(2))
    t = encoder_columns(sae, [9, 2])
    q = x @ t["W_enc"] + t["b_enc"]
    wanted = sae.pre_acts(x)[:, [9, 2]]
    # Sums of 32 products of size 1 in float32, with the bias taken out of the sum.
    torch.testing.assert_close(q, wanted, rtol=1e-4, atol=1e-4)
    assert ("threshold" in t) == (architecture == "jumprelu")


def test_a_topk_plan_holds_no_encoder(lm: LanguageModel) -> None:
    plan = plan_from_latents(lm, make_sae("topk"), None, {9: 1.0})
    assert plan.W_enc is None and (plan.sae.architecture, plan.sae.k) == ("topk", 5)


def test_the_first_latents_of_a_plan(lm: LanguageModel) -> None:
    sae = make_sae("jumprelu")
    plan = ranked(lm, sae=sae)
    one = plan.top(1)
    assert one.ids == (9,)
    other = plan.select([1])
    assert other.ids == (2,)
    for smaller, i in ((one, 9), (other, 2)):
        assert torch.equal(smaller.directions, sae.W_dec[[i]])
        assert torch.equal(smaller.part.tensors()["W_enc"], sae.W_enc[:, [i]])
        assert sae.threshold is not None and smaller.threshold is not None
        assert torch.equal(smaller.threshold, sae.threshold[[i]])
    with pytest.raises(UsageError, match=r"`top` must be in 1..2 for this plan, got 3"):
        plan.top(3)


def test_a_plan_knows_its_model(lm: LanguageModel, tiny_lm: Callable[..., tuple[Any, Any]]) -> None:
    plan = ranked(lm)
    plan.check_model(lm)
    twin = wrap_model(*tiny_lm("llama", seed=1), "twin")
    with pytest.raises(
        UserError, match="made for tiny and `model` twin differs .*weights.*`force`"
    ):
        plan.check_model(twin)
    plan.check_model(twin, force=True)
    deeper = dataclasses.replace(plan, model=dataclasses.replace(plan.model, n_layers=9))
    with pytest.raises(UserError, match="9 layers against 4"):
        deeper.check_model(lm)
    deeper.check_model(lm, force=True)
    with pytest.raises(UserError, match=r"steers layer 8 of tiny and tiny has layers 0..3"):
        dataclasses.replace(deeper, layer=8).check_model(lm, force=True)
    model = dataclasses.replace(plan.model, d_model=16)
    narrow = dataclasses.replace(
        plan, model=model, directions=plan.directions[:, :16], W_enc=None, b_enc=None
    )
    with pytest.raises(UserError, match="whose d_model is 16; tiny has 32"):
        narrow.check_model(lm, force=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 4}, r"layer must be in 0..3"),
        ({"latents": ()}, "needs at least one latent"),
        ({"latents": (LATENTS[0], LATENTS[0])}, "latent 9 is in the plan twice"),
        ({"latents": LATENTS[:1]}, r"directions has shape \[2, 32\]"),
        ({"directions": torch.full((2, 32), torch.nan)}, "directions holds NaN"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(
    change: dict[str, Any], message: str, lm: LanguageModel
) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(ranked(lm), **change)


def several(lm: LanguageModel) -> Plan:
    """Two parts that agree on their method and site alone."""
    one = ranked(lm)
    other = one.with_changes(layer=3, scope="generated", scale=0.5, metrics={"n": 1})
    return one.with_changes(parts=(*one.parts, *other.parts))


def test_a_plan_of_one_part_is_changed_like_its_part(lm: LanguageModel) -> None:
    plan = ranked(lm, metrics={"n": 3})
    changed = plan.with_changes(scale=2.0, scope="all", metrics={"n": 4})
    assert (changed.scale, changed.scope, changed.metrics) == (2.0, "all", {"n": 4})
    assert (plan.scale, plan.metrics) == (1.0, {"n": 3}) and changed.model == plan.model
    assert dataclasses.replace(plan, scale=2.0).doses() == changed.doses() == [4.0, 2.0]
    assert changed.part.directions is plan.directions
    with pytest.raises(UsageError, match="`scale` must be a finite number"):
        plan.with_changes(scale=float("nan"))
    with pytest.raises(TypeError, match="strength"):
        plan.with_changes(strength=2.0)


def test_what_the_parts_of_a_plan_agree_on_is_the_plans_own(lm: LanguageModel) -> None:
    plan = several(lm)
    assert (plan.method, plan.site, plan.sae.source) == ("add", "resid_post", "folder")
    assert [part.layer for part in plan.with_changes(method="min").parts] == [1, 3]
    assert not plan.is_off and plan.with_changes(scale=0.0).is_off
    for name in ("layer", "scope", "scale", "directions"):
        with pytest.raises(UsageError) as caught:
            getattr(plan, name)
        message = str(caught.value)
        assert message.startswith(f"`{name}` is not the same in all parts") and "\n" not in message
        assert "part 0 (layer 1, generation), part 1 (layer 3, generated)" in message
    with pytest.raises(UsageError, match="`scale` is not the same"):
        plan.with_changes(scale=2.0)
    with pytest.raises(UsageError, match="`scale` is not the same"):
        dataclasses.replace(plan, scale=2.0)


def test_one_of_several_parts_is_changed_by_its_number(lm: LanguageModel) -> None:
    plan = several(lm)
    changed = plan.with_changes(part=1, scale=3.0, metrics={"n": 2})
    assert [part.scale for part in changed.parts] == [1.0, 3.0] and changed.metrics == {"n": 2}
    assert changed.parts[0] is plan.parts[0]
    assert plan.only(1).doses() == [1.0, 0.5] and plan.only(1).layer == 3


def test_a_call_for_one_part_names_the_parts(lm: LanguageModel) -> None:
    for call in (Plan.doses, lambda plan: plan.top(1), lambda plan: with_gate(plan, "9 > 1")):
        with pytest.raises(UsageError, match=r"has part 0 \(layer 1, generation\), part 1 .*only"):
            call(several(lm))
    gated = with_gate(several(lm), "9 > 1", part=1)
    assert [part.gate for part in gated.parts] == ["", "9 > 1"]


def test_every_part_has_to_fit_the_model(lm: LanguageModel) -> None:
    with pytest.raises(UsageError, match=r"layer must be in 0..3 for tiny, got 7"):
        several(lm).with_changes(part=1, layer=7)
    plan = several(lm)
    shallow = plan.with_changes(model=dataclasses.replace(plan.model, n_layers=9), part=1, layer=8)
    with pytest.raises(UserError, match="steers layer 8 of tiny"):
        shallow.check_model(lm, force=True)


def test_the_vector_that_is_added(lm: LanguageModel) -> None:
    plan = ranked(lm, beta=1.0)
    doses = torch.tensor(plan.doses(), dtype=torch.float64)
    wanted = sum(dose * row.double() for dose, row in zip(doses, plan.directions, strict=True))
    torch.testing.assert_close(plan.part.added_vector(), wanted)
    relative = plan.with_changes(unit="rel", scale=-0.3).part.added_vector()
    torch.testing.assert_close(relative, wanted / wanted.norm() * -0.3)
    assert not plan.with_changes(scale=0.0).part.added_vector().any()
    opposite = torch.stack([plan.directions[0], -plan.directions[0] * (doses[0] / doses[1])])
    with pytest.raises(UsageError, match="cancel out"):
        plan.with_changes(directions=opposite).part.added_vector()


def test_the_table_of_methods_agrees_with_itself() -> None:
    for name, method in METHODS.items():
        assert not (method.adds and method.reads_latents), name
        assert method.adds or not method.keeps_norm, name
        assert method.adds == ("rel" in method.units), name
        assert set(method.units) <= set(UNITS) and set(method.exports) <= set(EXPORTS), name
        assert method.takes_dose or (method.units == ("raw",) and not method.grows), name
