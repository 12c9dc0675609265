"""Rankings with shuffled labels: chance is found where it is, and a real latent stands out."""

import numpy as np
import pytest
import torch

from saesteer.steering.ranking.chance import relabelled, shuffled
from saesteer.steering.ranking.detection_scores import NO_VARIANT, Texts, TextsBuilder, detect

CONTENTS, WORDINGS, D_SAE = 24, 3, 40
CARRIER, OF_CONTENT = 7, 11


def texts(seed: int = 0) -> Texts:
    """Latent 7 is on with the instruction alone; 11 on even contents; 20 to 38 at random."""
    generator = torch.Generator().manual_seed(seed)
    builder = TextsBuilder(D_SAE)
    for content in range(CONTENTS):
        for variant in (NO_VARIANT, *range(WORDINGS)):
            acts = torch.zeros(D_SAE)
            acts[20:39] = torch.rand(19, generator=generator) * (
                torch.rand(19, generator=generator) < 0.5
            )
            acts[CARRIER] = float(variant != NO_VARIANT) * (1 + 0.01 * content)
            acts[OF_CONTENT] = float(content % 2 == 0)
            builder.add(
                acts, positive=variant != NO_VARIANT, content=content, variant=variant,
                success=variant != NO_VARIANT,
            )  # fmt: skip
    return builder.build()


def test_labels_move_within_their_content_alone() -> None:
    one = texts()
    other = relabelled(one, np.random.default_rng(0))
    assert (other.positive != one.positive).any()
    np.testing.assert_array_equal(other.value, one.value)
    for content in range(CONTENTS):
        mine = one.content == content
        assert sorted(other.variant[mine]) == [NO_VARIANT, 0, 1, 2]
        np.testing.assert_array_equal(other.positive[mine], other.variant[mine] != NO_VARIANT)
        np.testing.assert_array_equal(other.success[mine], other.positive[mine])


def test_every_place_is_as_likely() -> None:
    """The plain label lands on each of a content's four texts a quarter of the time."""
    one, generator = texts(), np.random.default_rng(1)
    where = np.zeros(1 + WORDINGS)
    for _ in range(100):
        other = relabelled(one, generator)
        where += (~other.positive).reshape(CONTENTS, -1).sum(axis=0)
    # 2,400 draws: five standard deviations of a share of 1/4 are .044.
    assert where / where.sum() == pytest.approx([0.25] * 4, abs=0.044)


@pytest.mark.parametrize("by", ["saif", "rate", "meandiff", "auroc", "welch", "mi", "paired-t"])
def test_a_real_latent_stands_out_and_chance_does_not(by: str) -> None:
    found = shuffled(by, texts(), 3, shuffles=19)
    assert found is not None
    figures = found.summary()
    assert figures["best"]["real"] > figures["best"]["highest"]
    assert figures["best_auroc"]["real"] == 1.0 > figures["best_auroc"]["highest"]
    assert figures["discoveries"]["real"] >= 1 > figures["discoveries"]["mean"]
    assert figures["overlap"]["real"] == 1.0 > figures["overlap"]["mean"]
    assert found.of(CARRIER)["reached"] == 0 and found.of(CARRIER)["p"] == 1 / 20
    assert found.of(CARRIER)["score"] == detect(texts(), [by]).scores[by][CARRIER]
    assert found.of(CARRIER)["auroc_p"] == 1 / 20
    # What follows the content scores the same under every labelling, and never stands out.
    assert found.of(OF_CONTENT)["reached"] == 1.0 and found.of(OF_CONTENT)["p"] == 1.0
    assert found.of(3) == {}  # never on


def test_without_a_real_latent_nothing_is_found() -> None:
    """Over several data sets without a carrier, p at most .05 is as rare as it says."""
    hits = 0
    for seed in range(40):
        noise = texts(seed)
        kept = noise.latent != CARRIER
        blank = Texts(
            noise.d_sae, noise.latent[kept], noise.text[kept], noise.value[kept], noise.positive,
            noise.content, noise.variant, noise.success,
        )  # fmt: skip
        found = shuffled("meandiff", blank, 3, shuffles=19, seed=seed)
        assert found is not None
        best = int(found.latents[found.scores.argmax()])
        hits += found.of(best)["p"] <= 0.05
    # Binomial(40, 1/20): seven or more come up once in 300 times, and the seeds are fixed.
    assert hits < 7


def test_the_same_seed_gives_the_same_shuffles() -> None:
    one, other, third = (
        shuffled("saif", texts(), 3, shuffles=4, seed=seed) for seed in (5, 5, 6)
    )  # fmt: skip
    assert one is not None and other is not None and third is not None
    assert one.per_shuffle == other.per_shuffle != third.per_shuffle


def test_nothing_on_is_nothing_to_shuffle() -> None:
    builder = TextsBuilder(4)
    builder.add(torch.zeros(4), positive=True, content=0, variant=0, success=True)
    assert shuffled("saif", builder.build(), 3, shuffles=2) is None
