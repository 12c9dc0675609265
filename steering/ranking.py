"""Which latents carry an instruction: the call, and what it gives back."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE, load_sae
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.hooks import HookPoint, sae_hook_point
from saesteer.sae.models import LanguageModel, as_language_model
from saesteer.steering.lens import lens_scores
from saesteer.steering.lens import lens_tokens as lens_tokens
from saesteer.steering.output_scores import (
    attribution_scores,
    contrast_gradients,
    effect_scores,
    output_scores,
)
from saesteer.steering.plan import Plan, PlannedLatent, TaskIdentity, make_plan
from saesteer.steering.pvalues import benjamini_hochberg
from saesteer.steering.rank_config import READS as READS
from saesteer.steering.rank_config import SCORES as SCORES
from saesteer.steering.rank_config import RankConfig as RankConfig
from saesteer.steering.reading import Reader
from saesteer.steering.rerank import CausalTrial, causal_scores, causal_trials, require_check
from saesteer.steering.samples import Samples, contrasts, read_prompts, read_replies
from saesteer.steering.scores import NEUTRAL, detect, significance_of, to_tensor
from saesteer.steering.selection import LEADERS, best_first, duplicates, filter_masks, fuse
from saesteer.steering.shuffled import Shuffled, shuffled
from saesteer.steering.stability import Stability, jaccard, stability
from saesteer.steering.tasks import Task, load_task

STABLE_K = 15
"""The k of Jaccard@k: the number of latents in the paper's headline setting."""

_WITH_GRADIENTS = ("effect", "atp", "fused", "causal")


@dataclass(frozen=True, eq=False)
class Ranking:
    """Scores of every latent for one task, each `[d_sae]` float64.

    `mu` and `sigma` are over the positive samples where the latent is active, `highest` is the
    largest activation seen there. `by_variant` holds the sensitivity for each wording alone, in the
    order of `task.select_variants`; it is empty when replies were read.
    """

    task: Task
    config: RankConfig
    point: HookPoint
    score: Float[Tensor, " d_sae"]
    rate_positive: Float[Tensor, " d_sae"]
    rate_negative: Float[Tensor, " d_sae"]
    mean_difference: Float[Tensor, " d_sae"]
    mu: Float[Tensor, " d_sae"]
    sigma: Float[Tensor, " d_sae"]
    highest: Float[Tensor, " d_sae"]
    positives: int
    negatives: int
    by_variant: Float[Tensor, "variants d_sae"]
    columns: Mapping[str, Tensor]
    """Every score that was computed, by name; NaN where a latent was not tried."""
    p: Float[Tensor, " d_sae"]
    """p-value of the test `significance_of(by)`."""
    q: Float[Tensor, " d_sae"]
    """The same, adjusted for all latents at once (Benjamini-Hochberg)."""
    filters: Mapping[str, Tensor]
    """Which latents `dense`, `template` and `fdr` take out, or would."""
    control_rate: Float[Tensor, " d_sae"]
    """Share of plain texts' tokens where the latent is on."""
    template_rate: Float[Tensor, " d_sae"]
    """The same at the template, position 0 and attention sinks."""
    duplicate_of: Mapping[int, int]
    """Of the best latents, those whose direction a better one has already; and that one."""
    stability: Stability
    shuffled: Shuffled | None = None
    """The detection score with shuffled labels; None when that was not asked for."""
    trials: tuple[CausalTrial, ...] = ()
    """What `--by causal` steered with."""
    replies_used: tuple[int, int] | None = None
    """Instructed replies that passed the check, and all of them."""
    excluded: dict[str, int] = field(default_factory=lambda: {"sinks": 0})
    """Positions that would have been read and were left out, by reason."""

    def top(self, k: int) -> list[int]:
        """The best k latents that no filter in `config.drop` takes out: by score, ties by mu, then
        by number.

        Raises UserError when no latent scores above neutral (zero; 1/2 for auroc).
        """
        neutral = NEUTRAL.get(self.config.resolved_by, 0.0)
        gone = _gone(self.filters, self.config.drop)
        score = self.score if gone is None else self.score.masked_fill(gone, -torch.inf)
        skipped = self.duplicate_of if "duplicate" in self.config.drop else {}
        order = best_first(score, self.mu)[: k + len(skipped)].tolist()
        ids = [i for i in order if score[i] > neutral and i not in skipped][:k]
        if not ids and bool((self.score > neutral).any()):
            raise UserError(
                f"--drop {','.join(self.config.drop)} leaves no latent of "
                f"{int((self.score > neutral).sum())} that score above {neutral:g}: drop less, "
                "or raise --max-fdr"
            )
        if not ids and self.trials:
            plain = next(trial for trial in self.trials if trial.latent is None)
            raise UserError(
                f"no latent of {len({t.latent for t in self.trials}) - 1} on the shortlist makes "
                f"more answers pass than the unsteered {plain.successes} of {plain.n}: try other "
                "--doses, a longer --shortlist, or an SAE that saw the behaviour"
            )
        if not ids:
            raise UserError(
                f"no latent tells {self.task.name} apart at layer {self.point.layer}: the SAE may "
                "never have seen the behaviour (train with --replies), or try another --read"
            )
        return ids

    def flags(self, latent: int) -> dict[str, str]:
        """The filters that take a latent out, or would, and why."""
        reasons = {
            "dense": f"on at {self.control_rate[latent]:.0%} of plain text's tokens",
            "template": f"on at {self.template_rate[latent]:.0%} of the template's tokens and "
            f"{self.control_rate[latent]:.1%} of plain text's",
            "fdr": f"q {self.q[latent]:.2g} is above {self.config.max_fdr:g}",
        }
        found = {name: why for name, why in reasons.items() if bool(self.filters[name][latent])}
        if latent in self.duplicate_of:
            found["duplicate"] = f"nearly the direction of {self.duplicate_of[latent]}"
        return found

    def dropped(self) -> dict[str, int]:
        """How many latents with a score above neutral each filter takes out, or would."""
        scored = self.score > NEUTRAL.get(self.config.resolved_by, 0.0)
        counts = {name: int((mask & scored).sum()) for name, mask in self.filters.items()}
        return {**counts, "duplicate": len(self.duplicate_of)}

    def overlap(self) -> dict[str, float]:
        """For every score, the Jaccard index of its best `STABLE_K` latents with those by `by`."""

        def best(name: str, column: Tensor) -> set[int]:
            order = best_first(column, self.mu)[:STABLE_K].tolist()
            return {i for i in order if column[i] > NEUTRAL.get(name, 0.0)}

        own = best(self.config.resolved_by, self.score)
        return {name: jaccard(best(name, column), own) for name, column in self.columns.items()}

    def explain(self, latent: int) -> dict[str, Any]:
        """Everything that is known of one latent, JSON-ready."""
        row: dict[str, Any] = {
            "id": latent,
            "score": float(self.score[latent]),
            "rate_positive": float(self.rate_positive[latent]),
            "rate_negative": float(self.rate_negative[latent]),
            "mean_difference": float(self.mean_difference[latent]),
            "mu": float(self.mu[latent]),
            "sigma": float(self.sigma[latent]),
            "max": float(self.highest[latent]),
        }
        if len(self.by_variant):
            column = self.by_variant[:, latent]
            row["variant_min"] = float(column.min())
            row["variant_std"] = float(column.std(correction=0))
        row["p"], row["q"] = float(self.p[latent]), float(self.q[latent])
        row["control_rate"] = float(self.control_rate[latent])
        row["template_rate"] = float(self.template_rate[latent])
        row["scores"] = {name: float(column[latent]) for name, column in self.columns.items()}
        row["stability"] = self.stability.of(latent)
        if self.shuffled is not None:
            row["shuffled"] = self.shuffled.of(latent)
        row["filters"] = self.flags(latent)
        if self.trials:
            row["trials"] = [
                {"dose": t.dose, "successes": t.successes, "degenerate": t.degenerate, "n": t.n}
                for t in self.trials
                if t.latent == latent
            ]
        return row


def rank(
    model: str | LanguageModel,
    sae: str | SAE,
    task: str | Path | Task,
    config: RankConfig = RankConfig(),  # noqa: B008 (frozen: one may serve all)
    *,
    layer: int | None = None,
    site: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    progress: Progress = no_progress,
) -> Ranking:
    """Score every latent of an SAE for one instruction.

    Positive samples are train contents with a selection wording of the instruction, negative ones
    the contents alone. With on(x) = [a_j(z(x)) > 0] over N pairs (SAIF, arXiv 2502.11356):

    - `saif`: C_j = (1/N) sum on(x+) (1 - on(x-));
    - `rate`: share of positives minus share of negatives where the latent is on;
    - `meandiff`: mean activation over positives minus over negatives.

    The other detection scores are defined by `scores.detect`, those of the output side in
    `output_scores` and `lens`; `fused` is the reciprocal rank fusion of the base detection score,
    `effect` and `output`; `causal` steers with the best of those, one by one.

    With `read="span"` a positive sample is read at the tokens of the instruction and a negative one
    at its last token. With `read="reply"` the model answers both kinds of text. `rate`, `meandiff`,
    mu and sigma then count positions: the last prompt token and every reply token. The other scores
    count replies, each by its mean over those positions. Only instructed replies that pass the
    task's check count, except in `corr`.

    Attention sinks are left out everywhere. A text that is read at sinks alone is no sample, and
    neither is the other one of its pair: a content that is in no pair any more counts nowhere.

    Args:
        model: a name, folder or `.gguf` file, or a loaded `LanguageModel`.
        sae: a folder or `RELEASE:ID`, or a loaded `SAE`.
        task: a built-in name, a `task.yaml`, or a `Task`. Its dev and test contents and its
            evaluation wordings are never read.
        layer: where the SAE does not say what it reads; `site` likewise.
        force: let an SAE of other weights pass.

    Raises:
        UserError: SAE and model do not fit, the task has no train contents, no reply passes, only
            attention sinks would be read.
        UsageError: a layer or site that contradicts the SAE; a task without a check where replies
            or steered answers have to be judged.
        NonFiniteError: the model's activations are NaN or infinite.
    """
    lm = as_language_model(model, device=device, dtype=dtype)
    sae = (sae if isinstance(sae, SAE) else load_sae(sae)).to(lm.device)
    point = sae_hook_point(sae, lm, layer=layer, site=site, force=force)
    task = task if isinstance(task, Task) else load_task(task)
    contents = list(task.contents.get("train", ()))[: config.contents]
    if not contents:
        raise UserError(f"task {task.name!r} has no contents in its train split to rank with")
    if config.resolved_by == "causal":
        require_check(task)
    reader = Reader(lm, sae, point, config, progress)
    read = read_replies if config.read == "reply" else read_prompts
    return _Ranker(reader, task, contents, read(reader, task, contents)).ranking()


class _Ranker:
    """Makes the columns of a ranking, the dear ones only when they are asked for."""

    def __init__(self, reader: Reader, task: Task, contents: list[str], samples: Samples) -> None:
        self.reader, self.task, self.contents, self.samples = reader, task, contents, samples
        self.config = reader.config
        found = detect(samples.texts)
        self.columns = {name: to_tensor(column) for name, column in found.scores.items()}
        self.p = {name: to_tensor(column) for name, column in found.p.items()}
        success = detect(samples.every_reply, ["corr"]) if samples.every_reply else None
        if success is not None:
            self.columns["corr"] = to_tensor(success.scores["corr"])
            self.p["corr"] = to_tensor(success.p["corr"])
        # Counted over positions where there are many in a sample.
        self.columns["rate"] = samples.rate_difference
        self.columns["meandiff"] = samples.mean_difference
        if self.config.read == "reply":
            del self.columns["saif"]
        self.mu = samples.positive.active_mean
        p = self.p[significance_of(self.config.resolved_by)]
        self.p_chosen, self.q = p, to_tensor(benjamini_hochberg(p.numpy()))
        self.filters = filter_masks(reader.control, self.q, self.config.max_fdr)
        if self.config.read == "template":  # which is where this ranking looks
            self.filters["template"] = torch.zeros_like(self.filters["template"])
        self.trials: tuple[CausalTrial, ...] = ()

    def ranking(self) -> Ranking:
        config, samples, by = self.config, self.samples, self.config.resolved_by
        if by not in self.columns:
            self._output_side(by)
        score = self.columns[by]
        gone = _gone(self.filters, config.drop)
        masked = score if gone is None else score.masked_fill(gone, -torch.inf)
        leaders = best_first(masked, self.mu)[:LEADERS].tolist()
        leaders = [i for i in leaders if masked[i] > NEUTRAL.get(by, 0.0)]
        texts = samples.for_score(config.detection)
        chance = None
        if config.shuffles:
            chance = shuffled(
                config.detection, texts, STABLE_K, shuffles=config.shuffles, seed=config.seed,
                max_fdr=config.max_fdr,
            )  # fmt: skip
        return Ranking(
            task=self.task,
            config=config,
            point=self.reader.point,
            score=score,
            rate_positive=samples.positive.rate,
            rate_negative=samples.negative.rate,
            mean_difference=samples.mean_difference,
            mu=self.mu,
            sigma=samples.positive.active_std,
            highest=samples.positive.highest,
            positives=samples.positive.count,
            negatives=samples.negative.count,
            by_variant=samples.by_variant,
            columns=self.columns,
            p=self.p_chosen,
            q=self.q,
            filters=self.filters,
            control_rate=self.reader.control.text,
            template_rate=self.reader.control.other,
            duplicate_of=duplicates(leaders, self.reader.sae.W_dec[leaders]),
            stability=stability(config.detection, texts, self.task, STABLE_K),
            shuffled=chance,
            trials=self.trials,
            replies_used=samples.replies_used,
            excluded={"sinks": self.reader.sinks},
        )

    def _output_side(self, by: str) -> None:
        """Add the column `by`, and those that it is made of."""
        lm, sae = self.reader.lm, self.reader.sae
        wordings = [variant.text for variant in self.task.select_variants]
        self.columns["lens"] = lens_scores(lm, sae.W_dec, wordings, self.contents)
        base = self.config.base
        if by in _WITH_GRADIENTS:
            pairs = contrasts(self.reader, self.task, self.contents)
            slopes = contrast_gradients(lm, self.reader.point, pairs)
            self.columns["effect"] = effect_scores(sae, slopes)
            self.columns["atp"] = attribution_scores(sae, pairs, slopes, self.samples.texts)
        if by in ("output", "fused", "causal"):
            first = self.columns[base]
            if by != "output":
                first = self._fuse(base, "effect")
            self.columns["output"] = self._for_some(first, self.config.candidates, self._output)
        if by in ("fused", "causal"):
            self.columns["fused"] = self._fuse(base, "effect", "output")
        if by == "causal":
            self.columns["causal"] = self._for_some(
                self.columns["fused"], self.config.shortlist, self._causal
            )

    def _fuse(self, *names: str) -> Tensor:
        return fuse({name: self.columns[name] for name in names}, self.mu)

    def _for_some(self, score: Tensor, count: int, measure: Any) -> Tensor:
        """A column measured for the best `count` latents by another, NaN for the rest."""
        gone = _gone(self.filters, self.config.drop)
        if gone is not None:
            score = score.masked_fill(gone, -torch.inf)
        ids = best_first(score, self.mu)[:count]
        ids = ids[score[ids] > 0]
        column = torch.full_like(score, torch.nan)
        if len(ids):
            column[ids] = measure(ids.tolist())
        return column

    def _output(self, ids: list[int]) -> Tensor:
        reader = self.reader
        return output_scores(
            reader.lm, reader.sae, reader.point, ids, batch_size=self.config.batch_size
        )

    def _causal(self, ids: list[int]) -> Tensor:
        reader = self.reader
        self.trials = tuple(
            causal_trials(
                reader.lm, reader.sae, reader.point, self.task, self.config, ids, self.contents,
                reader.progress,
            )
        )  # fmt: skip
        scores = causal_scores(self.trials)
        return torch.tensor([scores[i] for i in ids], dtype=torch.float64)


def _gone(filters: Mapping[str, Tensor], drop: tuple[str, ...]) -> Tensor | None:
    """The latents that the chosen filters take out; `duplicate` needs an order and is not here."""
    masks = [filters[name] for name in drop if name != "duplicate"]
    return torch.stack(masks).any(dim=0) if masks else None


def plan_from_ranking(
    lm: LanguageModel,
    sae: SAE,
    ranking: Ranking,
    *,
    top: int = 15,
    method: str = "add",
    unit: str = "raw",
    scale: float = 1.0,
    beta: float = 0.0,
    scope: str = "generation",
) -> Plan:
    """A steering plan of the best `top` latents, with their statistics and lens tokens."""
    if top < 1:
        raise UsageError(f"--top must be at least 1, got {top}")
    latents = [
        PlannedLatent(
            id=i,
            score=float(ranking.score[i]),
            mu=float(ranking.mu[i]),
            sigma=float(ranking.sigma[i]),
            max=float(ranking.highest[i]),
            lens=tuple(lens_tokens(lm, sae.W_dec[i])),
        )
        for i in ranking.top(top)
    ]
    return make_plan(
        lm,
        sae,
        latents,
        layer=ranking.point.layer,
        site=ranking.point.site,
        method=method,
        unit=unit,
        scale=scale,
        beta=beta,
        scope=scope,
        task=TaskIdentity(ranking.task.name, ranking.task.hash, ranking.task.wordings),
        metrics={
            "by": ranking.config.resolved_by,
            "read": ranking.config.read,
            "position": ranking.config.position,
            "positives": ranking.positives,
            "negatives": ranking.negatives,
            "replies_used": list(ranking.replies_used) if ranking.replies_used else None,
        },
    )
