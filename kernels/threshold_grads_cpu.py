"""Straight-through gradients, one latent after the other, as a compiled CPU loop."""

from typing import no_type_check

import numpy as np

from saesteer.kernels.native import loop


@loop(cache=True)
@no_type_check
def threshold_grads_latents(
    pre_acts, thresholds, act_grads, prices, order, starts, bandwidth, to_input,
    pre_act_grads, threshold_grads, first, last,
):  # fmt: skip
    """Latents first..last-1. ``prices`` holds one number, or one for each entry."""
    half = bandwidth / np.float32(2)
    one_price = prices.shape[0] == 1
    for f in range(first, last):
        own = thresholds[f]
        total = np.float32(0)
        for at in range(starts[f], starts[f + 1]):
            entry = order[at]
            distance = np.float32(pre_acts[entry] - own)
            grad = act_grads[entry]
            through = grad if distance > 0 else np.float32(0)
            if abs(distance) < half:
                price = prices[0] if one_price else prices[entry]
                pull = np.float32((own * grad + price) / bandwidth)
                total += pull
                if to_input:
                    through += pull
            pre_act_grads[entry] = through
        threshold_grads[f] = -total
