"""Nearest latents equal those of a loop over all pairs."""

import pytest
import torch

from saesteer.sae.reading import neighbours
from saesteer.sae.reading.neighbours import nearest_by_cofiring, nearest_by_decoder

from .made_up_text import LATENTS, collected, made_up


@pytest.mark.parametrize("at_once", [1, 2**24])
def test_by_decoder_are_the_largest_cosines(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_NUMBERS_AT_ONCE", at_once)
    rows = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    rows[11] = 5 * rows[4] + 0.3 * rows[0]
    near = nearest_by_decoder(rows, torch.tensor([4, 0, 19]), 3)
    for place, latent in enumerate((4, 0, 19)):
        exact = torch.nn.functional.cosine_similarity(rows.double(), rows[latent].double()[None])
        order = [i for i in exact.argsort(descending=True).tolist() if i != latent][:3]
        assert near.latent[place].tolist() == order
        # float32 products of 7 numbers.
        assert near.value[place].tolist() == pytest.approx(exact[order].tolist(), abs=1e-6)
    assert near.latent[0, 0] == 11


@pytest.mark.parametrize("at_once", [1, 2**24])
def test_by_cofiring_are_the_largest_jaccard_indices(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_NUMBERS_AT_ONCE", at_once)
    text = made_up()
    near = nearest_by_cofiring(collected(text).rows.matrix(), torch.arange(LATENTS), 4)
    fires = text.acts[text.keep] != 0
    for latent in range(LATENTS):
        index = {}
        for other in range(LATENTS):
            both = int((fires[:, latent] & fires[:, other]).sum())
            either = int((fires[:, latent] | fires[:, other]).sum())
            if other != latent and both:
                index[other] = (both / either, both)
        order = sorted(index, key=lambda other: (-index[other][0], other))[:4]
        found = [i for i in near.latent[latent].tolist() if i >= 0]
        assert found == order
        assert near.value[latent].tolist()[: len(order)] == [index[i][0] for i in order]
        assert near.together is not None
        assert near.together[latent].tolist()[: len(order)] == [index[i][1] for i in order]
    assert (near.latent[3] == -1).all()  # it never fires


def test_an_sae_of_one_latent_has_no_neighbours() -> None:
    assert nearest_by_decoder(torch.ones(1, 3), torch.tensor([0]), 5).latent.shape == (1, 0)
