"""The most telling tokens of a latent: those it fires on far more often than text has them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_array

PRIOR = 100.0
"""Imagined firings, spread over the tokens as text has them."""
LEAST = 1.96
"""The log-odds of a telling token are at least so many standard deviations above 0."""


@dataclass(frozen=True)
class TellingToken:
    """One token, and what a latent does on it."""

    token: int
    z: float
    """Log-odds of the token among the latent's firings against all other rows, in standard
    deviations."""
    fired: int
    """Rows with this token on which the latent fires."""
    rows: int
    """Rows with this token."""


def telling_tokens(
    fires: "csr_array", tokens: NDArray[np.int32], ids: Sequence[int], k: int
) -> list[list[TellingToken]]:
    """Of each latent of `ids` the `k` most telling tokens, best first.

    Log-odds ratios with an informative Dirichlet prior: Monroe, Colaresi and Quinn, Fightin' Words
    (Political Analysis 16, 2008), equations 16, 19 and 22, with the tokens of all rows as the
    prior. Tokens less than `LEAST` standard deviations above 0 are left out.

    Args:
        fires: `[rows, d_sae]`, 1 where a latent fires.
        tokens: the token of each row.
    """
    from scipy.sparse import csr_array

    words, place = np.unique(tokens, return_inverse=True)
    background = np.bincount(place, minlength=len(words)).astype(np.float64)
    ends = np.arange(len(tokens) + 1)
    has = csr_array((np.ones(len(tokens)), place, ends), shape=(len(tokens), len(words)))
    found: list[list[TellingToken]] = []
    columns = fires.tocsc()
    for first in range(0, len(ids), 1024):
        own = list(ids[first : first + 1024])
        counts = (columns[:, own].T.astype(np.float64) @ has).tocsr()
        for row in range(len(own)):
            part = slice(counts.indptr[row], counts.indptr[row + 1])
            word, on = counts.indices[part], counts.data[part]
            z = log_odds(on, background[word], float(on.sum()), float(len(tokens)))
            order = np.argsort(-z, kind="stable")[:k]
            found.append(
                [
                    TellingToken(int(words[word[i]]), float(z[i]), int(on[i]),
                                 int(background[word[i]]))
                    for i in order
                    if z[i] >= LEAST
                ]
            )  # fmt: skip
    return found


def log_odds(
    on: NDArray[np.float64], everywhere: NDArray[np.float64], fired: float, rows: float
) -> NDArray[np.float64]:
    """z of each token: `on` of its `everywhere` rows are among the `fired` firings of `rows`."""
    prior = PRIOR * everywhere / rows
    off, silent = everywhere - on, rows - fired
    # A text of one token alone leaves no other: its odds are without bound.
    rest = [np.maximum(x, 1e-9) for x in (fired + PRIOR - on - prior, silent + PRIOR - off - prior)]
    inside, outside = np.log((on + prior) / rest[0]), np.log((off + prior) / rest[1])
    return np.asarray((inside - outside) / np.sqrt(1 / (on + prior) + 1 / (off + prior)))
