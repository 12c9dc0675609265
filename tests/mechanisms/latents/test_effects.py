"""Latents carry what patches one by one say; a latent that only marks has no effect at all."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE, SAESpec
from saesteer.mechanisms.config import LatentConfig, PatchConfig, VectorConfig
from saesteer.mechanisms.data.encoding import encode_pairs
from saesteer.mechanisms.data.pairs import Pair
from saesteer.mechanisms.latents.basis import latent_basis, sums_up
from saesteer.mechanisms.latents.effects import Moved, latent_effects
from saesteer.mechanisms.latents.patching import patch_latents
from saesteer.mechanisms.patching.grid import patch
from saesteer.mechanisms.patching.reference import patched_logits
from saesteer.mechanisms.patching.sites import Node, Patch, read_values
from saesteer.mechanisms.patching.vectors import instruction_vectors
from saesteer.mechanisms.reports.latent_page import save_latents
from saesteer.mechanisms.toys.hand_built import WORDS
from saesteer.sae.model.language_model import LanguageModel, wrap_model

from ..patching.test_vectors import make_pairs

Make = Callable[..., tuple[Any, Any]]


def make_sae(width: int = 32, d_sae: int = 40, layer: int = 1, **changes: Any) -> SAE:
    """A random JumpReLU SAE that fires on about half of its latents."""
    drawn = torch.Generator().manual_seed(4)
    facts: dict[str, Any] = {
        "architecture": "jumprelu", "d_model": width, "d_sae": d_sae,
        "hook_name": f"blocks.{layer}.hook_resid_post", "apply_b_dec_to_input": True,
        "dtype": "float64",
    }  # fmt: skip
    rows = torch.randn(d_sae, width, generator=drawn, dtype=torch.float64)
    return SAE(
        spec=SAESpec(**{**facts, **changes}),
        W_enc=(rows / width).T.contiguous(),
        b_enc=0.01 * torch.randn(d_sae, generator=drawn, dtype=torch.float64),
        W_dec=torch.nn.functional.normalize(rows, dim=-1),
        b_dec=0.01 * torch.randn(width, generator=drawn, dtype=torch.float64),
        threshold=None if changes else torch.full((d_sae,), 1e-3, dtype=torch.float64),
        source="an-sae",
    )


@pytest.fixture
def lm(tiny_lm: Make) -> LanguageModel:
    model, tokenizer = tiny_lm("llama")
    return wrap_model(model.double(), tokenizer)


def test_latents_constant_and_error_are_the_site(lm: LanguageModel) -> None:
    for sae in (make_sae(), make_sae(architecture="topk", k=9,
                                     rescale_acts_by_decoder_norm=True)):  # fmt: skip
        basis = latent_basis(lm, sae)
        h = torch.randn(5, 32, dtype=torch.float64)
        parts = basis.split(h)
        assert basis.node == Node("resid_post", 1) and (parts.acts != 0).float().mean() > 0.2
        torch.testing.assert_close(sums_up(basis, h, parts), h, rtol=0, atol=1e-12)


def test_effects_are_those_of_patches_one_by_one(lm: LanguageModel, tmp_path: Path) -> None:
    pairs = make_pairs()
    runs = PatchConfig(at=("query",), allow_copies=True, check_chance=False)
    sae = make_sae()
    result = patch_latents(lm, pairs, sae, runs, LatentConfig(verify=6, random=1, most=16))
    site = patch(lm, pairs, PatchConfig(at=("query",), layers=(1,), allow_copies=True,
                                        check_chance=False))  # fmt: skip
    # All latents and the error, put in together, are the whole site.
    np.testing.assert_allclose(result.site, site.effects[:, 0], atol=1e-10)
    encoded, _ = encode_pairs(lm, pairs, allow_copies=True)
    basis = latent_basis(lm, sae)
    pair, row = encoded[3], 3
    at = pair.place("query")
    (old,), base = read_values(lm, pair.clean, [(basis.node, at[0])])
    (new,), _ = read_values(lm, pair.corrupt, [(basis.node, at[1])])
    before, after = basis.split(old[None]), basis.split(new[None])

    def effect(value: torch.Tensor) -> float:
        logits = patched_logits(lm, pair.clean, [Patch(basis.node, at[0], value)])
        ends = [float(x[pair.answer] - x[pair.wrong]) for x in (logits, base)]
        return ends[0] - ends[1]

    change = (after.acts - before.acts)[0]
    for i, latent in enumerate(result.ids):
        expected = effect(old + change[latent] * basis.steps[latent])
        assert result.effects[row, i] == pytest.approx(expected, abs=1e-10)
    assert result.latents[row] == pytest.approx(effect(old + change @ basis.steps), abs=1e-10)
    error = after.error - before.error
    assert result.error[row] == pytest.approx(effect(old + error[0]), abs=1e-10)
    own = list(result.chosen)
    assert result.together[row] == pytest.approx(
        effect(old + change[own] @ basis.steps[own]), abs=1e-10
    )
    document = save_latents(tmp_path, result)
    assert document["shares"]["latents"]["value"] == pytest.approx(
        result.latents.mean() / result.site.mean()
    )
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2 and "the error alone" in page
    assert {curve.name for curve in result.curves} == {"carry", "mark", "random", "directions"}
    assert "latents carry" in repr(result) and len(result.to_frame()) == 6


def test_all_directions_are_the_site(lm: LanguageModel) -> None:
    """With as many directions as runs of the first half, those runs' differences are whole."""
    runs = PatchConfig(at=("query",), allow_copies=True, check_chance=False)
    result = patch_latents(lm, make_pairs(), make_sae(), runs, LatentConfig(random=0))
    directions = next(curve for curve in result.curves if curve.name == "directions")
    assert directions.sizes == (1, 2, 3, 4)
    first = [i for i in range(8) if i not in result.held_out]
    np.testing.assert_allclose(directions.effects[first, -1], result.site[first], atol=1e-10)


def planted(toy: LanguageModel, count: int = 8) -> tuple[SAE, list[Moved], int]:
    """Two latents on the hand-built model's last stream: 0 moves the output from apple to pear,
    1 the current word from F to G, which nothing reads."""
    v, words = len(WORDS), {word: i for i, word in enumerate(WORDS)}
    rows = torch.zeros(3, 3 * v)
    rows[0, 2 * v + words["apple"]], rows[0, 2 * v + words["pear"]] = -1, 1
    rows[1, words["F"]], rows[1, words["G"]] = -1, 1
    rows[2, 0] = 1
    spec = SAESpec(d_model=3 * v, d_sae=3, architecture="standard",
                   hook_name="blocks.1.hook_resid_post", apply_b_dec_to_input=False)  # fmt: skip
    sae = SAE(spec=spec, W_enc=rows.T.contiguous(), b_enc=torch.zeros(3), W_dec=rows,
              b_dec=torch.zeros(3 * v), source="planted")  # fmt: skip
    texts = [f"boxes F apple , {x} pear , P {y} . F" for x, y in
             zip("ABCDEHIJ", ("ball", "cup", "key", "map", "ring", "coat", "egg", "fan"),
                 strict=True)]  # fmt: skip
    pairs, _ = encode_pairs(toy, [Pair(t, t, " apple", " pear", group=t) for t in texts[:count]])
    found = []
    for pair in pairs:
        at = len(pair.clean) - 1
        (old,), _ = read_values(toy, pair.clean, [(Node("resid_post", 1), at)])
        found.append(Moved(pair, tuple(pair.clean), at, old, old + rows[0] + rows[1]))
    return sae, found, v


def test_a_latent_that_marks_does_not_carry(toy: LanguageModel) -> None:
    sae, moved, _ = planted(toy)
    basis = latent_basis(toy, sae, layer=1, site="resid_post")
    result = latent_effects(toy, basis, moved, "logit-diff")
    by_latent = {row["latent"]: row for row in result.summary}
    assert set(by_latent) == {0, 1}  # the third never changes
    assert by_latent[0]["effect"] == pytest.approx(-20, abs=1e-3) and by_latent[1]["effect"] == 0
    assert by_latent[1]["change"] == pytest.approx(1) and abs(by_latent[1]["t"]) > 1e3
    assert result.chosen == (0,) and result.reached
    assert result.shares["held out"].value == pytest.approx(1, abs=1e-4)
    assert result.shares["error"].value == 0 and result.carried[0] == 0


def test_a_site_that_moves_nothing_on_average_says_so(toy: LanguageModel) -> None:
    sae, moved, _ = planted(toy)
    basis = latent_basis(toy, sae, layer=1, site="resid_post")
    result = latent_effects(toy, basis, moved, "logit-diff")
    mixed = replace(result, site=result.site * np.array([1, -1] * 4))
    assert "shares of an effect around 0 mean little" in " ".join(mixed.warnings())
    assert "around 0" not in " ".join(result.warnings())


def test_what_a_dictionary_lacks_is_in_the_error(toy: LanguageModel) -> None:
    sae, moved, v = planted(toy)
    sae.W_dec[0] = 0  # the latent that carries writes nothing
    basis = latent_basis(toy, sae, layer=1, site="resid_post")
    result = latent_effects(toy, basis, moved, "logit-diff")
    assert result.shares["error"].value == pytest.approx(1, abs=1e-4) and not result.reached
    assert "no number of latents up to 128 brings 80% of" in " ".join(result.warnings())


def test_a_vector_in_latents_and_its_plan(lm: LanguageModel) -> None:
    pairs, sae = make_pairs(), make_sae()
    runs = VectorConfig(layers=(1,), controls=False)
    result = patch_latents(lm, pairs, sae, runs, LatentConfig(share=0.5, random=0),
                           others={"rank": [3, 1, 2]})  # fmt: skip
    whole = instruction_vectors(lm, pairs, runs)
    np.testing.assert_allclose(result.site, whole.effects[:, 0], atol=1e-10)
    assert {curve.name for curve in result.curves} == {"carry", "mark", "rank", "directions"}
    plan = result.plan(lm, sae, scope="last-prompt")
    assert tuple(latent.id for latent in plan.latents) == result.chosen
    assert plan.layer == 1 and plan.site == "resid_post" and plan.scope == "last-prompt"
    for latent, changes in zip(plan.latents, result.chosen_changes.T, strict=True):
        assert latent.mu == pytest.approx(changes.mean())
        assert latent.sigma == pytest.approx(changes.std())
    expected = result.chosen_changes.mean(axis=0) @ sae.W_dec[list(result.chosen)].numpy()
    np.testing.assert_allclose(plan.parts[0].added_vector().numpy(), expected, atol=1e-6)


def test_what_cannot_be(lm: LanguageModel, toy: LanguageModel) -> None:
    runs = PatchConfig(at=("last", "query"), allow_copies=True)
    with pytest.raises(UsageError, match="`at` must be one position for latents, got last, query"):
        patch_latents(lm, make_pairs(), make_sae(), runs)
    with pytest.raises(UsageError, match="scales or centres every token by itself"):
        latent_basis(lm, make_sae(normalize_activations="layer_norm"))
    with pytest.raises(UserError, match="no latent of `sae` planted differs"):
        sae, moved, _ = planted(toy)
        same = [Moved(m.pair, m.ids, m.at, m.old, m.old) for m in moved]
        latent_effects(toy, latent_basis(toy, sae, layer=1, site="resid_post"), same, "logit-diff")
    for settings in ({"verify": 0}, {"share": 0.0}, {"random": -1}):
        with pytest.raises(UsageError, match=f"`{next(iter(settings))}` must be"):
            LatentConfig(**settings)  # type: ignore[arg-type]
