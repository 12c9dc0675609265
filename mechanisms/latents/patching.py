"""`patch` in the basis of latents: of a pair's two runs, or of an instruction's vector."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from saesteer.checkpoints.errors import UsageError
from saesteer.checkpoints.sae_file import SAE, load_sae
from saesteer.mechanisms.config import LatentConfig, PatchConfig, VectorConfig
from saesteer.mechanisms.data.encoding import EncodedPair, encode_pairs
from saesteer.mechanisms.data.pairs import Pair, load_pairs
from saesteer.mechanisms.latents.basis import LatentBasis, latent_basis
from saesteer.mechanisms.latents.comparing import LatentDiff, latent_diff, moved_by_models
from saesteer.mechanisms.latents.effects import Moved, latent_effects
from saesteer.mechanisms.metrics import check_metric, default_metric
from saesteer.mechanisms.patching.sites import read_values
from saesteer.mechanisms.patching.vectors import VectorRuns, vector_runs
from saesteer.mechanisms.reports.latent_result import LatentResult
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.language_model import LanguageModel, as_language_model


def patch_latents(
    model: str | LanguageModel,
    pairs: str | Sequence[Pair],
    sae: str | Path | SAE,
    runs: PatchConfig | VectorConfig | None = None,
    config: LatentConfig | None = None,
    *,
    layer: int | None = None,
    site: str | None = None,
    others: Mapping[str, Sequence[int]] | None = None,
    device: str = "auto",
    dtype: str = "float32",
    n: int = 100,
    drop: bool | None = None,
    progress: Progress = no_progress,
) -> LatentResult:
    """Which latents of an SAE carry the difference of two runs, or an instruction's vector.

    Args:
        runs: with a `PatchConfig`, latents of one run of each pair are put into the other at its
            one position `at` (sites are the SAE's). With a `VectorConfig`, the source is the
            instruction's state, and the base the prompt without it.
        layer, site: where the SAE reads, if its file does not say.
        others: latents from elsewhere, best first, by name, to compare with.

    Returns:
        Effects of latents, of the error, and of the fewest latents that bring most: `print` it, or
        see `summary`, `shares`, `overlap`, and `plan`, which makes those a steering plan.

    Raises:
        UsageError: an SAE whose latents do not add up to one site; several positions.
        UserError: an SAE of another model; runs that do not differ, or whose difference at this
            site moves nothing.
    """
    runs = runs or PatchConfig()
    lm = as_language_model(model, device=device, dtype=dtype)
    opened = sae if isinstance(sae, SAE) else load_sae(sae)
    basis = latent_basis(lm, opened, layer=layer, site=site)
    if drop is None:
        drop = isinstance(pairs, str) and not Path(pairs).is_file()
    listed = load_pairs(pairs, n=n, seed=runs.seed) if isinstance(pairs, str) else list(pairs)
    if isinstance(runs, VectorConfig):
        made = vector_runs(lm, listed, runs, drop=drop, progress=progress)
        rows, metric = moved_by_vectors(made, basis), made.metric
    else:
        encoded, _ = encode_pairs(
            lm, listed, chat=runs.chat, allow_copies=runs.allow_copies, drop=drop
        )
        metric = runs.metric or default_metric(encoded)
        check_metric(metric, encoded)
        rows = moved_by_runs(lm, encoded, basis, runs)
    return latent_effects(lm, basis, rows, metric, config, others=others, progress=progress)


def compare_latents(
    base: str | LanguageModel,
    tuned: str | LanguageModel,
    pairs: str | Sequence[Pair],
    sae: str | Path | SAE,
    runs: PatchConfig | None = None,
    config: LatentConfig | None = None,
    *,
    layer: int | None = None,
    site: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    n: int = 100,
    drop: bool | None = None,
    progress: Progress = no_progress,
) -> tuple[LatentResult, LatentDiff]:
    """A base model against a tuned one, by the latents of one SAE, on the pairs' clean prompts.

    The first result puts the tuned model's latents into the base, at the one position `at`, and
    says which of them bring how much; the second says how often and how strongly latents are active
    in either. Raises what `patch_latents` raises, and UsageError for models of another form.
    """
    runs = runs or PatchConfig()
    ours, theirs = (as_language_model(lm, device=device, dtype=dtype) for lm in (base, tuned))
    opened = sae if isinstance(sae, SAE) else load_sae(sae)
    basis = latent_basis(ours, opened, layer=layer, site=site)
    if drop is None:
        drop = isinstance(pairs, str) and not Path(pairs).is_file()
    listed = load_pairs(pairs, n=n, seed=runs.seed) if isinstance(pairs, str) else list(pairs)
    encoded, _ = encode_pairs(
        ours, listed, chat=runs.chat, allow_copies=runs.allow_copies, drop=drop
    )
    metric = runs.metric or default_metric(encoded)
    check_metric(metric, encoded)
    diff = latent_diff(ours, theirs, basis, encoded, seed=runs.seed, progress=progress)
    moved = moved_by_models(ours, theirs, encoded, basis, _one(runs.at))
    return latent_effects(ours, basis, moved, metric, config, progress=progress), diff


def _one(at: Sequence[str]) -> str:
    """The only position. Raises UsageError for several."""
    if len(at) != 1 or at[0] == "all":
        raise UsageError(
            f"`at` must be one position for latents, got {', '.join(at)}: give one name"
        )
    return at[0]


def moved_by_runs(
    lm: LanguageModel, pairs: Sequence[EncodedPair], basis: LatentBasis, config: PatchConfig
) -> list[Moved]:
    """States of both runs of each pair at one position. Raises UsageError for several."""
    at, found = _one(config.at), []
    for pair in pairs:
        both = list(zip((pair.clean, pair.corrupt), pair.place(at), strict=True))
        if config.direction == "denoise":
            both.reverse()
        old, new = (read_values(lm, ids, [(basis.node, at)])[0][0] for ids, at in both)
        found.append(Moved(pair, tuple(both[0][0]), both[0][1], old, new))
    return found


def moved_by_vectors(runs: VectorRuns, basis: LatentBasis) -> list[Moved]:
    """States of the prompts without instruction, and of the instruction, at the SAE's site."""
    found = []
    for one in runs.asked:
        source = one.full if runs.config.taken == "full" else one.alone
        old, new = (
            read_values(runs.lm, ids, [(basis.node, at)])[0][0] for ids, at in (one.target, source)
        )
        found.append(Moved(one.pair, *one.target, old, new))
    return found
