"""Detection scores: how well each latent tells texts with an instruction from texts without it.

The texts' pooled activations are kept sparse, one entry for each latent that is on: memory is about
a dozen columns of `d_sae` numbers and 24 bytes for each active value, so a million latents fit.
Formulas are in float64; a latent that never fires scores 0 (AUROC 1/2).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NO_VARIANT = -1
"""The wording of a text without an instruction."""

LARGEST = 1e9
"""A standardised difference is cut here where the spread is 0."""


def _sums(places: Ints, weights: Array | None, length: int) -> Array:
    """For each index below `length`, the sum of its weights in `places`, or its count."""
    return np.bincount(places, weights, minlength=length).astype(np.float64)


@dataclass(frozen=True, eq=False)
class Texts:
    """Pooled latent activations of texts, stored sparsely, and the labels of each text.

    `latent`, `text` and `value` `[entries]` hold the activations above 0, sorted by latent; the
    other arrays are `[texts]`.
    """

    d_sae: int
    latent: Ints
    text: Ints
    value: Array
    positive: Bools
    """Whether the text has the instruction."""
    content: Ints
    variant: Ints
    """The number of its wording; `NO_VARIANT` without the instruction."""
    success: Bools
    """What `corr` correlates with: whether the reply passes the check or, where prompts are read,
    whether the text has the instruction."""

    def select(self, chosen: Bools) -> "Texts":
        """The chosen texts."""
        kept = chosen[self.text]
        places = np.cumsum(chosen) - 1
        return replace(
            self,
            latent=self.latent[kept],
            text=places[self.text[kept]],
            value=self.value[kept],
            positive=self.positive[chosen],
            content=self.content[chosen],
            variant=self.variant[chosen],
            success=self.success[chosen],
        )

    def compact(self) -> tuple["Texts", Ints]:
        """The same texts with only the latents that are ever active, and the latents' numbers."""
        ids, places = np.unique(self.latent, return_inverse=True)
        return replace(self, d_sae=len(ids), latent=places.astype(np.int64)), ids

    def total(self, weights: Array | None = None, chosen: Bools | None = None) -> Array:
        """For each latent, the sum of `weights` over its chosen entries, or their number."""
        latent = self.latent if chosen is None else self.latent[chosen]
        if weights is not None and chosen is not None:
            weights = weights[chosen]
        return _sums(latent, weights, self.d_sae)

    @cached_property
    def pairs(self) -> "Pairs":
        """The instructed texts, each with the plain text of its content."""
        return Pairs.of(self)


class TextsBuilder:
    """Collects texts one by one."""

    def __init__(self, d_sae: int) -> None:
        self.d_sae = d_sae
        self._facts: list[tuple[bool, int, int, bool]] = []
        self._latents: list[Ints] = []
        self._values: list[Array] = []

    def add(
        self, acts: Tensor, *, positive: bool, content: int, variant: int, success: bool
    ) -> None:
        """Add one text by its pooled activations `[d_sae]`, which are never negative."""
        found = acts.nonzero().flatten()
        self._latents.append(found.cpu().numpy())
        self._values.append(acts[found].double().cpu().numpy())
        self._facts.append((positive, content, variant, success))

    def dense(self, text: int) -> Tensor:
        """Activations `[d_sae]` of the text added as number `text`, in float64."""
        acts = torch.zeros(self.d_sae, dtype=torch.float64)
        acts[torch.from_numpy(self._latents[text])] = torch.from_numpy(self._values[text])
        return acts

    def build(self) -> Texts:
        """All texts added so far, with entries sorted by latent."""
        counts = [len(ids) for ids in self._latents]
        latent = np.concatenate([np.zeros(0, np.int64), *self._latents])
        value = np.concatenate([np.zeros(0), *self._values])
        text = np.repeat(np.arange(len(counts)), counts)
        order = np.argsort(latent, kind="stable")
        columns = list(zip(*self._facts, strict=True)) or [(), (), (), ()]
        return Texts(
            self.d_sae,
            latent[order],
            text[order],
            value[order],
            np.array(columns[0], bool),
            np.array(columns[1], np.int64),
            np.array(columns[2], np.int64),
            np.array(columns[3], bool),
        )


@dataclass(frozen=True, eq=False)
class Pairs:
    """Each instructed text paired with the plain text of the same content, stored sparsely.

    `latent`, `pair`, `instructed` and `plain` `[entries]` have an entry where a latent is active in
    either text of a pair; the last two are its activations there.
    """

    d_sae: int
    n: int
    latent: Ints
    pair: Ints
    instructed: Array
    plain: Array
    content: Ints
    """`[n]`: the content of each pair."""
    variant: Ints
    """`[n]`: the wording of each pair."""

    @staticmethod
    def of(texts: Texts) -> "Pairs":
        plain_of = {int(c): t for t, c in enumerate(texts.content) if not texts.positive[t]}
        chosen = [t for t in np.flatnonzero(texts.positive) if int(texts.content[t]) in plain_of]
        sides = np.array([[t, plain_of[int(texts.content[t])]] for t in chosen]).reshape(-1, 2)
        # Sorted by text, so that the entries of each text are consecutive.
        order = np.argsort(texts.text, kind="stable")
        ends = np.concatenate(
            [[0], np.cumsum(np.bincount(texts.text, minlength=len(texts.content)))]
        )
        parts: list[tuple[Ints, Ints, Ints]] = []
        for number, (one, other) in enumerate(sides.tolist()):
            for which, t in ((0, one), (1, other)):
                entries = order[ends[t] : ends[t + 1]]
                ones = np.ones(len(entries), np.int64)
                parts.append((entries, number * ones, which * ones))
        entries, pair, side = (
            np.concatenate([np.zeros(0, np.int64), *(part[i] for part in parts)]) for i in range(3)
        )
        n = len(sides)
        keys, places = np.unique(texts.latent[entries] * max(n, 1) + pair, return_inverse=True)
        values = texts.value[entries]
        both = [_sums(places, values * (side == which), len(keys)) for which in (0, 1)]
        rows = sides[:, 0] if n else np.zeros(0, np.int64)
        return Pairs(
            texts.d_sae,
            n,
            keys // max(n, 1),
            keys % max(n, 1),
            both[0],
            both[1],
            texts.content[rows],
            texts.variant[rows],
        )

    def count(self, chosen: Bools) -> Array:
        """For each latent, the number of its chosen entries."""
        return _sums(self.latent[chosen], None, self.d_sae)

    @cached_property
    def on_off(self) -> Array:
        """For each latent, the pairs where it is active only with the instruction."""
        return self.count((self.instructed > 0) & ~(self.plain > 0))

    @cached_property
    def off_on(self) -> Array:
        """For each latent, the pairs where it is active only without the instruction."""
        return self.count(~(self.instructed > 0) & (self.plain > 0))

    def on_off_of(self, variant: int) -> tuple[Array, int]:
        """`on_off` over the pairs of one wording, and how many there are."""
        mine = self.variant == variant
        chosen = (self.instructed > 0) & ~(self.plain > 0) & mine[self.pair]
        return self.count(chosen), int(mine.sum())

    @cached_property
    def by_content(self) -> tuple[Ints, Ints, Array, int]:
        """Mean difference of each content over its wordings: latents, contents, values `[entries]`,
        and the number of contents.

        Wordings of one content are not independent samples; contents are.
        """
        contents, place, wordings = np.unique(self.content, return_inverse=True, return_counts=True)
        n = len(contents)
        if not n:
            return self.latent, self.pair, self.instructed, 0
        keys, places = np.unique(self.latent * n + place[self.pair], return_inverse=True)
        sums = _sums(places, self.instructed - self.plain, len(keys))
        return keys // n, contents[keys % n], sums / wordings[keys % n], n


@dataclass(frozen=True)
class Moments:
    """Over `n` texts and for each latent: active texts, mean and unbiased variance."""

    n: int
    on: Array
    mean: Array
    variance: Array

    @staticmethod
    def of(texts: Texts, chosen: Bools) -> "Moments":
        mine, n = chosen[texts.text], int(chosen.sum())
        on = texts.total(chosen=mine)
        mean = texts.total(texts.value, mine) / max(n, 1)
        # Deviations from the mean and not sums of squares, which would lose digits.
        squares = texts.total(np.square(texts.value - mean[texts.latent]), mine)
        return Moments(n, on, mean, (squares + (n - on) * np.square(mean)) / max(n - 1, 1))


@dataclass(frozen=True)
class Detection:
    """Every detection score, and the p-values of those that are tests; `[d_sae]` each."""

    scores: dict[str, Array] = field(default_factory=dict)
    p: dict[str, Array] = field(default_factory=dict)


TEST_OF = {
    "saif": "mcnemar",
    "rate": "mcnemar",
    "cohen": "welch",
    **{name: name for name in ("logodds", "mcnemar", "welch", "paired-t", "auroc", "mi", "corr")},
}
"""The test whose p-value goes with a score. For all others: paired-t, whose unit is the content."""


def significance_of(by: str) -> str:
    """The name in `Detection.p` of the test that goes with a score."""
    return TEST_OF.get(by, "paired-t")


NEUTRAL = {"auroc": 0.5}
"""The neutral value of a score where that is not 0. Latents at or below it are never chosen."""


def detect(texts: Texts, only: Sequence[str] | None = None) -> Detection:
    """All detection scores of one set of texts, or those named.

    With n1 and n0 texts of the classes, D the difference of means and s^2 the unbiased variances:

    - `saif`: share of pairs on with the instruction and off without; `rate`: difference of firing
      rates; `meandiff`: D;
    - `logodds`: log of the odds ratio of the on/off table, 1/2 added to each cell;
    - `mcnemar`: sign(b - c) (b - c)^2 / (b + c), b pairs on-off, c off-on;
    - `cohen`: D / pooled s; `welch`: D / sqrt(s1^2 / n1 + s0^2 / n0);
    - `paired-t`: mean over contents of the paired difference (averaged over wordings), divided by
      its standard error;
    - `auroc`: P(A1 > A0) + P(A1 = A0) / 2, exact;
    - `mi`: mutual information of on/off and class in nats, negative where the latent is on less
      often with the instruction;
    - `corr`: correlation with `success`.
    """
    wanted = set(TEST_OF) | {"meandiff"} if only is None else set(only)
    positive, negative = Moments.of(texts, texts.positive), Moments.of(texts, ~texts.positive)
    difference = positive.mean - negative.mean
    found = Detection()
    scores, p = found.scores, found.p
    if wanted & {"saif", "mcnemar", "rate"}:
        pairs = texts.pairs
        b, c = pairs.on_off, pairs.off_on
        scores["saif"] = b / max(pairs.n, 1)
        scores["mcnemar"] = np.sign(b - c) * np.square(b - c) / np.maximum(b + c, 1)
        p["mcnemar"] = mcnemar(b, c)
    # Integers, divided once at the end: tied latents get exactly the same score.
    crossed = positive.on * negative.n - negative.on * positive.n
    scores["rate"] = crossed / max(positive.n * negative.n, 1)
    scores["meandiff"] = difference
    if "cohen" in wanted:
        pooled = (
            (positive.n - 1) * positive.variance + (negative.n - 1) * negative.variance
        ) / max(positive.n + negative.n - 2, 1)
        scores["cohen"] = _standardised(difference, np.sqrt(pooled))
    if wanted & {"welch", "cohen"}:
        scores["welch"], p["welch"] = _welch(positive, negative, difference)
    if "paired-t" in wanted:
        scores["paired-t"], p["paired-t"] = _paired_t(texts.pairs)
    if "logodds" in wanted:
        cells = [positive.on, negative.n - negative.on, negative.on, positive.n - positive.on]
        n11, n00, n01, n10 = (cell + 0.5 for cell in cells)
        scores["logodds"] = np.log(n11 * n00 / (n10 * n01))
        spread = np.sqrt(1 / n11 + 1 / n00 + 1 / n10 + 1 / n01)
        p["logodds"] = _normal_two_sided(scores["logodds"] / spread)
        # With classes of unequal size the added 1/2 gives equal rates a score that is not 0.
        scores["logodds"] = np.where(crossed == 0, 0.0, scores["logodds"])
    if "mi" in wanted:
        information = _mutual_information(positive, negative)
        scores["mi"] = np.sign(crossed) * information
        p["mi"] = _normal_two_sided(np.sqrt(2 * (positive.n + negative.n) * information))
    if "auroc" in wanted:
        scores["auroc"], p["auroc"] = _auroc(texts, positive, negative)
    if "corr" in wanted:
        scores["corr"], p["corr"] = _correlation(texts)
    return found


def mcnemar(on_off: Array, off_on: Array) -> Array:
    """p of McNemar's test: exact binomial below 25 discordant pairs, chi-squared from there on."""
    from scipy import special

    total, fewer = on_off + off_on, np.minimum(on_off, off_on)
    pairs, heads = np.ogrid[:25, :25]
    exact = np.minimum(1.0, 2 * special.bdtr(heads, pairs, 0.5))
    small = total < 25
    places, columns = (np.where(small, x, 0).astype(np.int64) for x in (total, fewer))
    many = _normal_two_sided((on_off - off_on) / np.sqrt(np.maximum(total, 1)))
    found: Array = np.where(small, exact[places, columns], many)
    return found


def _normal_two_sided(z: Array) -> Array:
    """P(|Z| >= |z|) of a standard normal; also P(X >= z^2) of chi-squared with one degree."""
    from scipy import special

    found: Array = 2 * special.ndtr(-np.abs(z))
    return found


def _t_two_sided(t: Array, df: Array | int) -> Array:
    """P(|T| >= |t|) of Student's t with `df` degrees of freedom; NaN where there are none."""
    from scipy import special

    found: Array = 2 * special.stdtr(df, -np.abs(t))
    return found


def _standardised(difference: Array, spread: Array) -> Array:
    """difference / spread, 0 where both are 0, cut at `LARGEST`."""
    floor = np.maximum(np.abs(difference) / LARGEST, np.finfo(np.float64).tiny)
    return difference / np.maximum(spread, floor)


def _welch(positive: Moments, negative: Moments, difference: Array) -> tuple[Array, Array]:
    """Welch's t and its two-sided p, with Satterthwaite's degrees of freedom.

    Where neither class varies, p is that of the limit of t: 0 where the means differ, 1 where
    they are equal.
    """
    parts = [m.variance / max(m.n, 1) for m in (positive, negative)]
    both = parts[0] + parts[1]
    t = _standardised(difference, np.sqrt(both))
    weights = parts[0] ** 2 / max(positive.n - 1, 1) + parts[1] ** 2 / max(negative.n - 1, 1)
    df = np.where(weights > 0, both**2 / np.where(weights > 0, weights, 1.0), 0.0)
    if min(positive.n, negative.n) < 2:
        return t, np.ones_like(t)
    p = np.where(weights > 0, _t_two_sided(t, df), 0.0)
    return t, np.where(difference == 0, 1.0, p)


def _paired_t(pairs: Pairs) -> tuple[Array, Array]:
    latent, _, value, n = pairs.by_content
    mean = _sums(latent, value, pairs.d_sae) / max(n, 1)
    there = _sums(latent, None, pairs.d_sae)
    squares = _sums(latent, np.square(value - mean[latent]), pairs.d_sae)
    variance = (squares + (n - there) * np.square(mean)) / max(n - 1, 1)
    t = _standardised(mean, np.sqrt(variance / max(n, 1)))
    if n < 2:
        return t, np.ones_like(t)
    return t, np.where(mean == 0, 1.0, _t_two_sided(t, n - 1))


def _mutual_information(positive: Moments, negative: Moments) -> Array:
    """Of on/off and class, in nats."""
    n = max(positive.n + negative.n, 1)
    found = np.zeros_like(positive.mean)
    on = (positive.on + negative.on) / n
    for moments in (positive, negative):
        for cell, rate in ((moments.on, on), (moments.n - moments.on, 1 - on)):
            joint, apart = cell / n, rate * (moments.n / n)
            with np.errstate(divide="ignore", invalid="ignore"):
                found += np.where(joint > 0, joint * np.log(joint / apart), 0.0)
    return np.maximum(found, 0.0)


def _auroc(texts: Texts, positive: Moments, negative: Moments) -> tuple[Array, Array]:
    """AUROC from sparse values, and p of the Mann-Whitney test with ties and continuity."""
    order = np.lexsort((texts.value, texts.latent))
    latent, value = texts.latent[order], texts.value[order]
    first = texts.positive[texts.text[order]]
    # Groups of equal value within a latent.
    new = np.ones(len(latent), bool)
    new[1:] = (latent[1:] != latent[:-1]) | (value[1:] != value[:-1])
    starts = np.flatnonzero(new)
    positives = np.add.reduceat(first.astype(np.float64), starts) if len(starts) else np.zeros(0)
    size = np.diff(np.append(starts, len(latent))).astype(np.float64)
    negatives = size - positives
    group_latent = latent[starts]
    below = np.cumsum(negatives) - negatives
    head = np.searchsorted(group_latent, group_latent)  # where each latent's groups begin
    below = below - (below[head] if len(head) else 0)
    won = _sums(group_latent, positives * (below + negatives / 2), texts.d_sae)
    off_positive, off_negative = positive.n - positive.on, negative.n - negative.on
    u = won + positive.on * off_negative + off_positive * off_negative / 2
    pairs = max(positive.n * negative.n, 1)
    n = positive.n + negative.n
    tied = _sums(group_latent, size**3 - size, texts.d_sae)
    zeros = off_positive + off_negative
    tied = tied + zeros**3 - zeros
    variance = pairs / 12 * ((n + 1) - tied / max(n * (n - 1), 1))
    gap = np.abs(u - pairs / 2) - 0.5
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(variance > 1e-12, np.maximum(gap, 0) / np.sqrt(np.maximum(variance, 0)), 0.0)
    return u / pairs, _normal_two_sided(z)


def _correlation(texts: Texts) -> tuple[Array, Array]:
    """Correlation with success and its two-sided p; 0 and 1 where either does not vary."""
    n, y = len(texts.success), texts.success.astype(np.float64)
    everything = Moments.of(texts, np.ones(n, bool))
    spread = y.var() * n
    covered = texts.total(texts.value * (y - y.mean())[texts.text] if n else None)
    scale = np.sqrt(everything.variance * max(n - 1, 1) * spread)
    r = np.clip(np.where(scale > 0, covered / np.where(scale > 0, scale, 1.0), 0.0), -1, 1)
    if n < 3:
        return r, np.ones_like(r)
    t = r * np.sqrt((n - 2) / np.maximum(1 - np.square(r), 1e-18))
    return r, np.where(r == 0, 1.0, _t_two_sided(t, n - 2))


def to_tensor(column: Any) -> Tensor:
    """A column as float64."""
    return torch.from_numpy(np.ascontiguousarray(column, dtype=np.float64))
