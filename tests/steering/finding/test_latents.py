"""Latents in place of directions: pursuit against the best of all subsets, and equal lengths."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.steering.finding.latents import LatentPhases, pursue
from saesteer.steering.ranking.lens import lens_tokens

from ..whole_row import make_sae


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def explained(wanted: Tensor, rows: Tensor) -> float:
    fitted = torch.linalg.lstsq(rows.T, wanted.T).solution.T @ rows
    return 1 - float(((wanted - fitted) ** 2).sum() / (wanted**2).sum())


@pytest.mark.parametrize("places", [1, 3])
def test_what_was_made_of_few_rows_is_found_exactly(places: int) -> None:
    rows = noise(20, 40)
    weights = noise(places, 3, seed=1)
    found = pursue(weights @ rows[[4, 11, 17]], rows, 8)
    assert sorted(found.ids[:3]) == [4, 11, 17] and len(found.ids) == 3
    order = [found.ids.index(i) for i in (4, 11, 17)]
    torch.testing.assert_close(found.weights[2][:, order], weights)
    assert found.explained[2] == pytest.approx(1)


def test_each_step_is_the_best_fit_of_its_rows() -> None:
    rows, wanted = noise(9, 12), noise(2, 12, seed=3)
    found = pursue(wanted, rows, 4)
    for n in range(1, 5):
        ids = list(found.ids[:n])
        assert found.explained[n - 1] == pytest.approx(explained(wanted, rows[ids]))
    assert list(found.explained) == sorted(found.explained)
    # The first row is the best single one; later ones may fall behind the best subset.
    best = max(explained(wanted, rows[[i]]) for i in range(9))
    assert found.explained[0] == pytest.approx(best)
    pair = max(explained(wanted, rows[list(two)]) for two in combinations(range(9), 2))
    assert found.explained[1] <= pair + 1e-9


def test_rows_of_length_0_and_equal_rows_are_never_taken_twice() -> None:
    rows = noise(4, 8)
    rows[1], rows[3] = 0, rows[0]
    found = pursue(rows[:1] + rows[2:3], rows, 4)
    assert set(found.ids) == {0, 2} or set(found.ids) == {3, 2}


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_parts_are_as_long_as_the_directions(architecture: str, lm: LanguageModel) -> None:
    sae = make_sae(lm, architecture, layer=2)
    tail, replies = noise(4, 3, lm.d_model).float(), noise(4, lm.d_model, seed=2).float()
    found = LatentPhases.of(lm, sae, tail, replies, "tail", 10)
    for n in (1, 4, 10):
        part = found.part(lm, "tail", n)
        assert (part.layer, part.scope, len(part.ids)) == (2, "tail", n)
        lengths = part.added_vectors().norm(dim=1)
        torch.testing.assert_close(lengths, tail[2].double().norm(dim=1), rtol=1e-5, atol=0)
        part = found.part(lm, "replies", n)
        length = float(part.added_vector().norm())
        assert length == pytest.approx(float(replies[2].double().norm()), rel=1e-5)
        # With more latents the sum turns to the direction.
        cosine = float(part.added_vector() @ replies[2].double()) / length**2
        assert cosine == pytest.approx(found.pursuits["replies"].explained[n - 1] ** 0.5, rel=1e-4)
        assert all(latent.lens for latent in part.latents)


def test_shares_take_the_fewest_latents(lm: LanguageModel) -> None:
    sae = make_sae(lm, layer=2)
    tail, replies = noise(4, 3, lm.d_model).float(), noise(4, lm.d_model, seed=2).float()
    found = LatentPhases.of(lm, sae, tail, replies, "tail", 12)
    for phase, pursuit in found.pursuits.items():
        for share in (0.05, 0.3, 0.5):
            n = found.count(phase, share)
            assert pursuit.explained[n - 1] >= share or n == 12
            assert n == 1 or pursuit.explained[n - 2] < share
        assert found.count(phase, 1.1) == 12
    row = found.row(0.3, lm)
    ids = found.pursuits["replies"].ids[: found.count("replies", 0.3)]
    assert row["replies"]["latents"] == list(ids)  # type: ignore[index]
    lens = row["replies"]["lens"]  # type: ignore[index]
    assert lens == [lens_tokens(lm, sae.W_dec[i]) for i in ids[:8]]


def test_saes_of_other_places_are_refused(lm: LanguageModel) -> None:
    tail, replies = noise(4, 3, lm.d_model).float(), noise(4, lm.d_model).float()
    sae = make_sae(lm, layer=2, normalize_activations="layer_norm")
    with pytest.raises(UserError, match="scales each token, and directions are found"):
        LatentPhases.of(lm, sae, tail, replies, "tail", 4)
