"""What one pass keeps of each latent equals what a plain loop over all activations finds."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from saesteer.sae.reading import collect
from saesteer.sae.reading.kept_contexts import HELD_OUT, KeptContexts
from saesteer.sae.reading.tally import BINS_PER_OCTAVE, LOWEST_OCTAVE

from .made_up_text import CONFIG, CONTEXTS, LATENTS, LENGTH, MadeUpText, collected, made_up

CUTS = [(24,), (1,) * 24, (7, 9, 8)]


def priority(number: int, position: int, seed: int) -> float:
    """splitmix64 in whole numbers of any size."""
    mask = 2**64 - 1
    x = (number * 1_000_003 + position + 0x9E3779B9 * (seed + 1)) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return ((x ^ (x >> 31)) & 0xFFFFFF) / 2**24


def strongest(text: MadeUpText, latent: int, k: int) -> list[tuple[int, int]]:
    """(context, position) of the strongest firing of each context, strongest first."""
    best = []
    for number in range(CONTEXTS):
        sizes = [abs(float(a)) for a in text.acts[number, :, latent]]
        if max(sizes):
            best.append((-max(sizes), number, sizes.index(max(sizes))))
    return [(number, position) for _, number, position in sorted(best)[:k]]


def drawn(text: MadeUpText, latent: int, k: int, *, held_out: bool) -> list[tuple[int, int]]:
    """Of each context the firing of highest priority, highest first."""
    best = []
    for number in range(CONTEXTS):
        if (number % HELD_OUT == HELD_OUT - 1) != held_out:
            continue
        firing = [p for p in range(LENGTH) if text.acts[number, p, latent] != 0]
        if firing:
            rank = {p: priority(number, p, CONFIG.text.seed) for p in firing}
            position = max(firing, key=lambda p: rank[p])
            best.append((-rank[position], number, position))
    return [(number, position) for _, number, position in sorted(best)[:k]]


def places(heap: KeptContexts, latent: int) -> list[tuple[int, int]]:
    pairs = zip(heap.number[latent].tolist(), heap.position[latent].tolist(), strict=True)
    return [pair for pair in pairs if pair[0] >= 0]


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("signed", [False, True])
def test_the_kept_contexts_are_those_of_a_plain_loop(cuts: tuple[int, ...], signed: bool) -> None:
    text = made_up(signed=signed)
    found = collected(text, cuts, signed=signed)
    for latent in range(LATENTS):
        assert places(found.strongest, latent) == strongest(text, latent, CONFIG.contexts)
        for heap, held_out in ((found.sampled, False), (found.held_out, True)):
            k = heap.key.shape[1]
            assert places(heap, latent) == drawn(text, latent, k, held_out=held_out)
    assert len(places(found.strongest, 0)) == 4 and places(found.strongest, 3) == []


@pytest.mark.parametrize("cuts", CUTS)
def test_windows_hold_the_activations_around_each_position(cuts: tuple[int, ...]) -> None:
    text = made_up()
    found = collected(text, cuts)
    for heap in (found.strongest, found.sampled, found.held_out):
        assert heap.acts.shape[2] == 6
        for latent in range(LATENTS):
            for slot, (number, position) in enumerate(places(heap, latent)):
                first = min(max(position - 3, 0), LENGTH - 6)  # whole, also at the ends
                expected = text.acts[number, first : first + 6, latent]
                assert torch.equal(heap.acts[latent, slot], expected)
                assert heap.window.first(position, LENGTH) == first


@pytest.mark.parametrize("signed", [False, True])
def test_figures_are_those_of_a_plain_loop(signed: bool) -> None:
    text = made_up(1, signed=signed)
    tally = collected(text, (5, 19), signed=signed).tally
    assert tally.rows == int(text.keep.sum())
    for latent in range(LATENTS):
        acts = [float(a) for a in text.acts[text.keep][:, latent] if a]
        assert int(tally.fired[latent]) == len(acts)
        assert float(tally.density()[latent]) == len(acts) / tally.rows
        bins = Counter(
            math.floor((math.log2(abs(a)) - LOWEST_OCTAVE) * BINS_PER_OCTAVE) for a in acts
        )
        counts = {i: n for i, n in enumerate(tally.histogram[latent].tolist()) if n}
        assert counts == dict(bins)
        if not acts:
            assert float(tally.mean()[latent]) == float(tally.strongest[latent]) == 0
            continue
        mean = sum(acts) / len(acts)
        assert float(tally.mean()[latent]) == pytest.approx(mean, rel=1e-12, abs=1e-12)
        variance = sum((a - mean) ** 2 for a in acts) / len(acts)
        # A difference of squares: float64 leaves half its digits.
        assert float(tally.std()[latent]) == pytest.approx(math.sqrt(variance), abs=1e-7)
        assert abs(float(tally.strongest[latent])) == max(map(abs, acts))
        assert float(tally.strongest[latent]) in acts
        assert float(tally.size[latent]) == sum(map(abs, acts))


def test_pieces_of_a_batch_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    text = made_up(2)
    whole = collected(text)
    monkeypatch.setattr(collect, "MOST_NUMBERS", 2 * LENGTH * LATENTS)
    cut = collected(text)
    for name in ("strongest", "sampled", "held_out"):
        one, other = getattr(whole, name), getattr(cut, name)
        assert all(
            torch.equal(getattr(one, part), getattr(other, part))
            for part in ("key", "number", "position", "acts")
        )
    assert torch.equal(whole.tally.histogram, cut.tally.histogram)
    assert (whole.rows.matrix() != cut.rows.matrix()).nnz == 0


def test_only_chosen_latents_keep_contexts() -> None:
    text = made_up(3)
    some, whole = collected(text, (24,), ids=[9, 2]), collected(text)
    assert torch.equal(some.strongest.acts[0], whole.strongest.acts[9])
    assert torch.equal(some.held_out.number[1], whole.held_out.number[2])
    assert torch.equal(some.tally.fired, whole.tally.fired)  # figures are of all
    assert some.bytes() * 6 == whole.bytes()


def test_background_windows_are_held_out_and_say_what_fires_in_them() -> None:
    text = made_up(4)
    found = collected(text, (11, 13))
    held = [n for n in range(CONTEXTS) if n % HELD_OUT == HELD_OUT - 1 and text.keep[n].any()]
    assert [one.number for one in found.background] == held
    for one in found.background:
        first = min(max(one.position - 3, 0), LENGTH - 6)
        fires = (text.acts[one.number, first : first + 6] != 0).any(dim=0)
        assert one.active.tolist() == fires.nonzero()[:, 0].tolist()
        assert bool(text.keep[one.number, one.position])


def test_background_windows_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    text = made_up(4)
    every = collected(text).background
    monkeypatch.setattr(collect, "BACKGROUND", 3)
    few = collected(text, (10, 14)).background

    def drawn_first(one: collect.BackgroundWindow) -> float:
        return priority(one.number, one.position, CONFIG.text.seed + 1)

    best = sorted(every, key=drawn_first)[-3:]
    assert [(one.number, one.position) for one in few] == sorted(
        (one.number, one.position) for one in best
    )


def test_memory_does_not_grow_with_the_text() -> None:
    config = replace(CONFIG, contexts=2)
    one = collected(made_up(), config=config)
    before = one.bytes()
    for seed in range(1, 4):
        more = made_up(seed)
        batch = replace(more.batch, numbers=more.batch.numbers + seed * CONTEXTS)
        one.add(batch, more.keep, more.acts[more.keep])
    assert one.bytes() == before
