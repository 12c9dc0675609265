"""`rank` scores every latent for an instruction; `plan_from_ranking` makes a plan of the best."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE, load_sae
from saesteer.sae.config import Progress
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.sae.model.sae_places import sae_places, steered
from saesteer.sae.runs.bars import show_progress
from saesteer.steering.plans.from_sae import make_plan
from saesteer.steering.plans.plan import Plan, PlannedLatent, TaskIdentity
from saesteer.steering.ranking.causal import (
    CausalTrial,
    causal_scores,
    causal_trials,
    require_check,
)
from saesteer.steering.ranking.chance import shuffled
from saesteer.steering.ranking.config import READS as READS
from saesteer.steering.ranking.config import SCORES as SCORES
from saesteer.steering.ranking.config import RankConfig as RankConfig
from saesteer.steering.ranking.detection_scores import NEUTRAL, detect, significance_of, to_tensor
from saesteer.steering.ranking.lens import lens_scores
from saesteer.steering.ranking.lens import lens_tokens as lens_tokens
from saesteer.steering.ranking.output_scores import (
    attribution_scores,
    contrast_gradients,
    effect_scores,
    output_scores,
)
from saesteer.steering.ranking.reading import LatentReader
from saesteer.steering.ranking.result import STABLE_K as STABLE_K
from saesteer.steering.ranking.result import Ranking as Ranking
from saesteer.steering.ranking.samples import Samples, contrasts, read_prompts, read_replies
from saesteer.steering.ranking.selection import (
    LEADERS,
    best_first,
    duplicates,
    filter_masks,
    fuse,
    masked_out,
)
from saesteer.steering.ranking.stability import stability
from saesteer.steering.tasks.task import Task, load_task

_WITH_GRADIENTS = ("effect", "atp", "fused", "causal")


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
    progress: Progress = show_progress,
) -> Ranking:
    """Score every latent of an SAE for one instruction.

    Positive samples are train contents with a selection wording of the instruction, negative ones
    the contents alone. With on(x) = [a_j(z(x)) > 0] over N pairs (SAIF, arXiv 2502.11356):

    - `saif`: C_j = (1/N) sum on(x+) (1 - on(x-));
    - `rate`: share of positives minus share of negatives where the latent is on;
    - `meandiff`: mean activation over positives minus over negatives.

    The other detection scores are defined by `detection_scores.detect`, those of the output side in
    `output_scores` and `lens`; `fused` is the reciprocal rank fusion of the base detection score,
    `effect` and `output`; `causal` steers with the best of those, one by one.

    With `read="span"` a positive sample is read at the tokens of the instruction and a negative one
    at its last token. With `read="reply"` the model answers both kinds of text. `rate`, `meandiff`,
    mu and sigma then count positions: the last prompt token and every reply token. The other scores
    count replies, each by its mean over those positions. Only instructed replies that pass the
    task's check count, except in `corr`.

    Attention sinks are left out everywhere. A text that would be read only at sinks is left out
    with the other text of its pair, and a content without any pair left is not used at all.

    Args:
        model: a name, folder or `.gguf` file, or a loaded `LanguageModel`.
        sae: a folder or `RELEASE:ID`, or a loaded `SAE`.
        task: a built-in name, a `task.yaml`, or a `Task`. Its dev and test contents and its
            evaluation wordings are never read.
        layer, site: what the SAE reads; needed where the SAE does not say. For a crosscoder the one
            of its places at which the plan will steer.
        force: accept an SAE that was trained on other weights.

    Raises:
        UserError: SAE and model do not fit, the task has no train contents, no reply passes, only
            attention sinks would be read.
        UsageError: a layer or site that contradicts the SAE; a task without a check where replies
            or steered answers have to be judged.
        NonFiniteError: the model's activations are NaN or infinite.
    """
    lm = as_language_model(model, device=device, dtype=dtype)
    sae = (sae if isinstance(sae, SAE) else load_sae(sae)).to(lm.device)
    places = sae_places(sae, lm, layer=layer, site=site, force=force)
    # A latent is read where the SAE reads, and its direction is that of the place where it steers.
    point, sae = steered(sae, lm, layer=layer, site=site, force=force)
    task = task if isinstance(task, Task) else load_task(task)
    contents = list(task.contents.get("train", ()))[: config.contents]
    if not contents:
        raise UserError(f"task {task.name!r} has no contents in its train split to rank with")
    if config.resolved_by == "causal":
        require_check(task)
    reader = LatentReader(lm, sae, point, config, progress, places)
    read = read_replies if config.read == "reply" else read_prompts
    return _Ranker(reader, task, contents, read(reader, task, contents)).ranking()


class _Ranker:
    """Computes the scores of a ranking, one column each; expensive ones only when needed."""

    def __init__(
        self, reader: LatentReader, task: Task, contents: list[str], samples: Samples
    ) -> None:
        from scipy import stats

        self.reader, self.task, self.contents, self.samples = reader, task, contents, samples
        self.config = reader.config
        found = detect(samples.texts)
        self.columns = {name: to_tensor(column) for name, column in found.scores.items()}
        self.p = {name: to_tensor(column) for name, column in found.p.items()}
        success = detect(samples.every_reply, ["corr"]) if samples.every_reply else None
        if success is not None:
            self.columns["corr"] = to_tensor(success.scores["corr"])
            self.p["corr"] = to_tensor(success.p["corr"])
        # With replies these two count positions, of which a sample has many.
        self.columns["rate"] = samples.rate_difference
        self.columns["meandiff"] = samples.mean_difference
        if self.config.read == "reply":
            del self.columns["saif"]
        self.mu = samples.positive.active_mean
        p = self.p[significance_of(self.config.resolved_by)]
        self.p_chosen, self.q = p, to_tensor(stats.false_discovery_control(p.numpy()))
        self.filters = filter_masks(reader.control, self.q, self.config.max_fdr)
        if self.config.read == "template":  # latents active at the template are wanted here
            self.filters["template"] = torch.zeros_like(self.filters["template"])
        self.trials: tuple[CausalTrial, ...] = ()

    def ranking(self) -> Ranking:
        """All columns, statistics, filters and baselines."""
        config, samples, by = self.config, self.samples, self.config.resolved_by
        if by not in self.columns:
            self._output_side(by)
        score = self.columns[by]
        dropped = masked_out(self.filters, config.drop)
        masked = score if dropped is None else score.masked_fill(dropped, -torch.inf)
        leaders = best_first(masked, self.mu)[:LEADERS].tolist()
        leaders = [i for i in leaders if masked[i] > NEUTRAL.get(by, 0.0)]
        texts = samples.for_score(config.detection)
        chance = None
        if config.shuffles:
            chance = shuffled(
                config.detection,
                texts,
                STABLE_K,
                shuffles=config.shuffles,
                seed=config.seed,
                max_fdr=config.max_fdr,
            )
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
        """Add the column `by`, which is not a detection score, and those that it is made of."""
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
        """A column that is measured for the best `count` latents by `score`; NaN for the others."""
        dropped = masked_out(self.filters, self.config.drop)
        if dropped is not None:
            score = score.masked_fill(dropped, -torch.inf)
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
                reader.lm,
                reader.sae,
                reader.point,
                self.task,
                self.config,
                ids,
                self.contents,
                reader.progress,
            )
        )
        scores = causal_scores(self.trials)
        return torch.tensor([scores[i] for i in ids], dtype=torch.float64)


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
    """A steering plan of the best `top` latents, with their statistics and lens tokens.

    Raises UsageError for `top` below 1 and what `make_plan` raises, UserError when no latent scores
    above neutral.
    """
    if top < 1:
        raise UsageError(f"`top` must be at least 1, got {top}")
    point = ranking.point
    _, view = steered(sae, lm, layer=point.layer, site=point.site, force=True)
    latents = [
        PlannedLatent(
            id=i,
            score=float(ranking.score[i]),
            mu=float(ranking.mu[i]),
            sigma=float(ranking.sigma[i]),
            max=float(ranking.highest[i]),
            lens=tuple(lens_tokens(lm, view.W_dec[i])),
        )
        for i in ranking.top(top)
    ]
    return make_plan(
        lm,
        sae,
        latents,
        layer=point.layer,
        site=point.site,
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
