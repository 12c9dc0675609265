"""How densely a prompt token drives a reply, and the score of an instruction.

S `[prompt, reply]` is rectified, each column divided by its maximum and rounded up to levels;
levels up to the cut count as nothing. a_n = |S_n|_1 / |S_n|_p, divided by its largest over the
prompt, and I = sum over the instruction's tokens of a_n / log2(2 + their number). Since the levels
that are left are nearly equal, a_n is about K_n^(3/4) with K_n the reply tokens that n is among the
strongest of: K_n / M is given as well, which does not grow with the reply.
"""

import numpy as np

from saesteer.mechanisms.reading_config import AttributeConfig

Array = np.ndarray


def densities(scores: Array, config: AttributeConfig) -> tuple[Array, Array]:
    """(a_n, K_n / M), `[prompt tokens]` each."""
    rectified = np.maximum(scores, 0)
    most = rectified.max(0)
    shares = np.divide(rectified, most, out=np.zeros_like(rectified), where=most > 0)
    # A product such as .7 x 10 must not be rounded up to the next level.
    levels = np.ceil(shares * config.levels - 1e-9)
    levels[levels <= config.cut] = 0
    below = (levels**config.power).sum(1) ** (1 / config.power)
    density = np.divide(levels.sum(1), below, out=np.zeros(len(levels)), where=below > 0)
    largest = density.max(initial=0)
    held = (levels > 0).sum(1) / max(1, scores.shape[1])
    return (density / largest if largest > 0 else density), held


def instruction_score(density: Array, start: int, end: int) -> float:
    """I of the tokens [start, end)."""
    return float(density[start:end].sum() / np.log2(2 + end - start))
