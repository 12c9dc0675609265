"""Rows that an SAE was not trained on, and how well it does on them.

Live, they are the text that comes after that of training. Text that is read more than once (several
`epochs`, replies) has no such rest: there a share of the documents is held back from the start. Of
shards they are the rows that are left of the first epoch, or, where training needs all of those,
the last ones that were harvested.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.places import Place
from saesteer.sae.activations.batches import ActivationSource
from saesteer.sae.config import TrainConfig
from saesteer.sae.training.input_scale import PlacedRows
from saesteer.sae.training.sae_trainer import SAETrainer

# Rows, as a share of the run, so many at most: their mean L0 is known to a few thousandths.
_SHARE = 0.05
_MOST = 32_768
# Latent activations that exist at once: 64 MiB in float32.
_CHUNK_ELEMENTS = 2**24
_ROWS_AT_ONCE = 2048


def wanted_rows(config: TrainConfig) -> int:
    """How many rows are read beside those of training."""
    share = config.held_out_share or _SHARE
    return min(_MOST, max(config.batch_tokens, round(config.tokens * share)))


def held_back_of_shards(config: TrainConfig, rows: int, at_once: int) -> int:
    """How many of `rows` stored rows, read `at_once` at most, training leaves out: none where there
    are more than it can read."""
    if not config.held_out_share or config.tokens + at_once + wanted_rows(config) <= rows:
        return 0
    return min(wanted_rows(config), int(rows * config.held_out_share))


def read_held_out(
    source: ActivationSource,
    count: int,
    read: Callable[[int], None] = lambda rows: None,
) -> tuple[Float[Tensor, "rows width"] | None, str]:
    """Up to `count` rows that `source` has not given, on the CPU, and why there are not more.

    `read` is called with the number of rows so far. No text there is an error: a run that is at its
    end is not lost for what nobody trains on.
    """
    parts: list[Tensor] = []
    found = 0
    try:
        rest = source.held_out()
        while rest is not None and found < count and (rows := rest.next_rows()) is not None:
            parts.append(rows[: count - found].cpu())
            found += len(parts[-1])
            read(found)
    except UserError as error:
        return (torch.cat(parts) if found else None), str(error)
    why = "" if found == count else "no other text was left"
    return (torch.cat(parts) if found else None), why


@torch.no_grad()
def figures(trainer: SAETrainer, rows: PlacedRows, facts: Mapping[str, Any]) -> dict[str, float]:
    """`fvu_heldout` and `l0_heldout` of an SAE as its file will compute it, in float32.

    FVU is sum |y - x^|^2 / sum |y - mean y|^2, each place in the units of training, so that several
    places count alike.
    """
    sae = trainer.as_sae(dict(facts))
    reads = _side_by_side(rows, trainer.variant.reads)
    writes = _side_by_side(rows, trainer.variant.writes)
    units = torch.cat([torch.full((len(s.mean),), s.factor) for s in trainer.write])
    units = units.to(sae.W_dec.device)
    total = sum(piece.double().sum(dim=0) for piece in writes.split(_ROWS_AT_ONCE))
    mean = (total / len(writes)).to(units.device, torch.float32)
    error = deviation = active = 0.0
    size = max(1, _CHUNK_ELEMENTS // sae.spec.d_sae)
    for x, y in zip(reads.split(size), writes.split(size), strict=True):
        x, y = x.to(units.device).float(), y.to(units.device).float()
        latent_acts = sae.encode(x)
        error += float(((y - sae.decode(latent_acts, x)) * units).square().sum(dtype=torch.float64))
        deviation += float(((y - mean) * units).square().sum(dtype=torch.float64))
        active += int((latent_acts != 0).sum())
    return {"fvu_heldout": error / max(deviation, 1e-30), "l0_heldout": active / len(reads)}


def _side_by_side(rows: PlacedRows, places: tuple[Place, ...]) -> Float[Tensor, "rows width"]:
    parts = [rows.at(place) for place in places]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


# Rows in which a latent is active, for each weight it has: with fewer, much of what it learns is
# the noise of the rows it saw. (Ten per coefficient is the usual rule for regressions.)
_ROWS_PER_WEIGHT = 10
# An FVU this many times as large on rows that were not trained on shows that there were too few.
_GAP = 1.5


def few_rows(
    trainer: SAETrainer, rows: int, fvu: float, heldout: Mapping[str, float]
) -> str | None:
    """What to warn of when an SAE does much worse on other rows than on the `rows` it was trained
    on; None where it does not."""
    if heldout["fvu_heldout"] <= _GAP * fvu:
        return None
    weights = trainer.d_in + trainer.d_out
    seen = rows * heldout["l0_heldout"] / trainer.variant.d_sae
    if seen >= _ROWS_PER_WEIGHT * weights:
        return None
    enough = rows * _ROWS_PER_WEIGHT * weights / max(seen, 1e-9)
    return (
        f"FVU is {fvu:.3g} on rows trained on and {heldout['fvu_heldout']:.3g} on others: "
        f"{rows:,} rows are few for {trainer.variant.d_sae:,} latents. Each is active in about "
        f"{seen:,.0f} of them and has {weights:,} weights; ten rows a weight would take "
        f"{enough:,.0f}: more text and `tokens`, or fewer latents (`d_sae`)"
    )


def too_few_rows(trainer: SAETrainer, rows: int) -> str | None:
    """What to warn of before an SAE is trained on `rows`; None where they may do, or where its L0
    is not known in advance.

    With less than one row for each weight of a latent there is no need to wait for the held-out
    rows; above it they tell, see `few_rows`.
    """
    settings = trainer.architecture.settings
    l0 = settings.get("k") or settings.get("l0_target")
    weights = trainer.d_in + trainer.d_out
    if not l0 or rows * l0 / trainer.variant.d_sae >= weights:
        return None
    d_sae = trainer.variant.d_sae
    return (
        f"{rows:,} rows are few for {d_sae:,} latents: with an L0 of {l0:g} each will be active in "
        f"about {rows * l0 / d_sae:,.0f} of them and has {weights:,} weights; ten rows a weight "
        f"would take {_ROWS_PER_WEIGHT * weights * d_sae / l0:,.0f}: more text and `tokens`, or "
        "fewer latents (`d_sae`)"
    )


# Share of its target by which an L0 has to miss it for a warning.
_MISSED = 0.2


def missed(name: str, target: float | None, heldout: Mapping[str, float]) -> str | None:
    """What to warn of when L0 is far from its target; None where it is not, or there is none."""
    if target is None or abs(heldout["l0_heldout"] / target - 1) <= _MISSED:
        return None
    return (
        f"{name} has an L0 of {heldout['l0_heldout']:.3g} on held-out rows where {target:g} was "
        "aimed at: train on more `tokens`"
    )
