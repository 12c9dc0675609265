"""A reading from a model to cards: against the whole of its activations, held at once."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.sae.activations.reader import ActivationStream
from saesteer.sae.model.hooks import resolve_site
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.reading.card import LatentCard, TaskMark
from saesteer.sae.reading.kept_contexts import HELD_OUT
from saesteer.sae.reading.result import Latents
from saesteer.sae.text.contexts import open_contexts
from saesteer.sae.verbs.latents import latents

from ..reading.small_sae import CONFIG, D_SAE, config, small_sae

Shared = Callable[..., LanguageModel]


@pytest.fixture(scope="module")
def whole(shared_lm: Shared) -> tuple[Tensor, Tensor, Tensor]:
    """Everything at once: activations [contexts, seq, d_sae], tokens, and what is kept."""
    lm = shared_lm()
    sae, point = small_sae(lm), resolve_site(lm, 1)
    stream = ActivationStream(lm, [point], open_contexts(lm, CONFIG.text), CONFIG.text)
    grids, tokens, keeps, rows = [], [], [], 0
    while rows < CONFIG.tokens:
        read = stream.next_batch()
        assert read is not None
        grid = torch.zeros(*read.keep.shape, D_SAE)
        grid[read.keep] = sae.encode(read.activations[point.key])
        grids.append(grid)
        tokens.append(read.source.token_ids)
        keeps.append(read.keep)
        rows += int(read.keep.sum())
    return torch.cat(grids), torch.cat(tokens), torch.cat(keeps)


@pytest.fixture(scope="module")
def found(shared_lm: Shared) -> Latents:
    lm = shared_lm()
    return latents(small_sae(lm), lm, config(every=True))


def test_cards_show_what_the_activations_hold(
    found: Latents, whole: tuple[Tensor, Tensor, Tensor], shared_lm: Shared
) -> None:
    acts, tokens, keep = whole
    assert len(found) == D_SAE and found.ids == list(range(D_SAE))
    for latent in (0, 17, 47):
        card, own = found[latent], acts[:, :, latent]
        fired = own[keep][own[keep] != 0].double()
        assert card.rows == int(keep.sum()) and card.fired == len(fired)
        assert card.density == len(fired) / card.rows
        assert card.max == float(fired.max()) and card.mean == pytest.approx(float(fired.mean()))
        assert card.std == pytest.approx(float(fired.std(correction=0)), rel=1e-5)
        assert sum(count for _, _, count in card.histogram) == card.fired
        low, high = card.histogram[0][0], card.histogram[-1][1]
        assert low <= float(fired.min()) and float(fired.max()) < high
        best = own.max(dim=1).values
        order = best.argsort(descending=True, stable=True)[:3].tolist()
        assert [one.number for one in card.top] == order
        for one in card.top:
            assert one.position == int(own[one.number].argmax())
            first = one.position - one.index
            assert list(one.acts) == own[one.number, first : first + 9].tolist()
            ids = tokens[one.number, first : first + 9].tolist()
            assert "".join(one.tokens) == shared_lm().tokenizer.decode(ids)
            assert one.act == float(best[one.number])


def test_quantiles_run_from_weak_to_strong_over_firings_that_are_not_held_out(
    found: Latents, whole: tuple[Tensor, Tensor, Tensor]
) -> None:
    acts, _, _ = whole
    card = found[17]
    assert [part.firings for part in card.quantiles] == [2, 2, 2, 2]
    borders = [(part.low, part.high) for part in card.quantiles]
    assert all(low <= high for low, high in borders)
    assert all(a[1] <= b[0] for a, b in zip(borders, borders[1:], strict=False))
    for part in card.quantiles:
        (one,) = part.contexts
        assert part.low <= one.act <= part.high
        assert one.act == float(acts[one.number, one.position, 17])
        assert one.number % HELD_OUT != HELD_OUT - 1


def test_windows_to_judge_on_are_held_out_and_of_both_kinds(
    found: Latents, whole: tuple[Tensor, Tensor, Tensor]
) -> None:
    acts, tokens, _ = whole
    windows = found.windows(17)
    fires = [window.fires for window in windows]
    assert fires[:4] == [True] * 4 and 1 <= len(fires[4:]) <= 4 and not any(fires[4:])
    shown = {one.number for one in found.shown_to_describer(17)}
    assert shown and all(number % HELD_OUT != HELD_OUT - 1 for number in shown)
    held = [n for n in range(len(acts)) if n % HELD_OUT == HELD_OUT - 1]
    for window in windows:
        places = [(n, p) for n in held for p in range(32 - 8)
                  if frozenset(tokens[n, p : p + 9].tolist()) == window.tokens]  # fmt: skip
        assert places
        assert any(bool(acts[n, p : p + 9, 17].any()) == window.fires for n, p in places)


def test_the_lens_and_neighbours_are_of_the_decoder_rows(found: Latents, shared_lm: Shared) -> None:
    lm, card = shared_lm(), found[30]
    sae = small_sae(lm)
    with torch.no_grad():
        row = sae.W_dec[30].double() * math.sqrt(lm.d_model)
        logits = lm.unembed(lm.final_norm(row.float())).double()  # type: ignore[misc]
    up = logits.argsort(descending=True)[:4].tolist()
    down = logits.argsort()[:4].tolist()
    assert [one.token for one in card.lens_up] == [found.pieces.one(i) for i in up]
    assert [one.token for one in card.lens_down] == [found.pieces.one(i) for i in down]
    # float32 products of 32 numbers.
    assert card.lens_up[0].logit == pytest.approx(float(logits[up[0]]), abs=1e-4)
    cosine = (sae.W_dec.double() @ sae.W_dec[30].double()).tolist()
    order = sorted((i for i in range(D_SAE) if i != 30), key=lambda i: -cosine[i])[:3]
    assert [one.id for one in card.near] == order


def test_a_latent_that_never_fires_has_a_card(found: Latents) -> None:
    card = found[5]
    assert (card.fired, card.top, card.quantiles, card.histogram) == (0, (), (), ())
    assert card.description.text.startswith("never fires on these 1,")
    assert card.lens_up and card.near and not card.cofires
    assert "never fires" in card._repr_html_()


def test_which_latents_are_chosen(shared_lm: Shared, whole: tuple[Tensor, Tensor, Tensor]) -> None:
    lm = shared_lm()
    sae, (acts, _, _) = small_sae(lm), whole
    sae.W_dec[40] *= 100  # a long row writes much
    top = latents(sae, lm, config(steer=0, top=3))
    size = acts.double().sum(dim=(0, 1))
    size[40] *= 100
    assert top.ids == size.argsort(descending=True)[:3].tolist() and top.ids[0] == 40
    some = latents(sae, lm, config(steer=0, ids=(7, 3)))
    assert some.ids == [7, 3] and [card.id for card in some] == [7, 3]
    assert some[3].top == latents(sae, lm, config(steer=0, every=True))[3].top
    assert 3 in some and 4 not in some
    with pytest.raises(UserError, match="latent 4 was not read: 2 latents were chosen"):
        some[4]


def test_steered_marked_and_shown(shared_lm: Shared) -> None:
    lm = shared_lm()
    mark = TaskMark("french", 2, 0.5, "rate", "runs/plan")
    found = latents(small_sae(lm), lm, config(ids=(1, 2, 3)), tasks={2: [mark]})
    assert found[1].steered and found[2].steered and found[3].steered is None
    assert found[2].tasks == (mark,) and found[1].tasks == ()
    html = found[2]._repr_html_()
    assert "Steering with it" in html and "runs/plan" in html and "<style>" in html
    assert repr(found).startswith("Latents(sae=made-up, model=tiny-llama, latents=3, d_sae=48")
    assert repr(found[2]).startswith("LatentCard(id=2, density=")
    frame = found.to_frame()
    assert list(frame.index) == [1, 2, 3]
    assert frame.loc[2, "max"] == found[2].max


def test_a_model_describes(shared_lm: Shared) -> None:
    from saesteer.sae.reading.card import Description
    from saesteer.sae.reading.describe import Describer

    class Fake(Describer):
        def __init__(self) -> None:
            pass

        def check(self) -> None:
            pass

        def describe(self, contexts: Any, windows: Any) -> Description:
            return Description(f"{len(contexts)} and {len(windows)}", "fake")

    lm = shared_lm()
    found = latents(small_sae(lm), lm, config(ids=(5, 6), steer=0), describer=Fake())
    assert [one.by for one in found[6].descriptions] == ["fake", "log-odds"]
    assert (
        found[6].description.text
        == f"{len(found.shown_to_describer(6))} and {len(found.windows(6))}"
    )
    assert [one.by for one in found[5].descriptions] == ["log-odds"]  # it never fires


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_other_families(family: str, shared_lm: Shared) -> None:
    lm = shared_lm(family)
    card: LatentCard = latents(small_sae(lm), lm, config(ids=(1,), steer=1))[1]
    assert card.fired and card.lens_up and card.steered


def test_what_cannot_be(shared_lm: Shared) -> None:
    lm = shared_lm()
    sae = small_sae(lm)
    with pytest.raises(UsageError, match=r"`ids` 48 is out of range: the SAE has 48 latents"):
        latents(sae, lm, config(ids=(48,)))
    dead = small_sae(lm)
    dead.b_enc -= 1e9
    with pytest.raises(UserError, match="no latent fires on these"):
        latents(dead, lm, config())
    for wrong, says in (
        ({"ids": (1, 1)}, "names a latent twice"),
        ({"dose": 0.0}, "`dose` must be above 0"),
        ({"neutral_prompt": " "}, "`neutral_prompt` is empty"),
        ({"top": 0}, "`top` must be at least 1"),
    ):
        with pytest.raises(UsageError, match=says):
            config(**wrong)
