"""A ranking as a document, and on disk: plan, `ranking.json` and all scores of all latents."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saesteer.checkpoints.files import write_json, write_tensors
from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.reading.found_pages import latent_pages as find_latent_pages
from saesteer.sae.reading.found_pages import link
from saesteer.steering.plans.plan import Plan
from saesteer.steering.plans.plan_file import save_plan
from saesteer.steering.ranking.detection_scores import significance_of
from saesteer.steering.ranking.lens import lens_tokens
from saesteer.steering.ranking.result import Ranking


def ranking_document(
    lm: LanguageModel,
    sae: SAE,
    ranking: Ranking,
    plan: Plan,
    explain: Sequence[int] | None = None,
) -> dict[str, Any]:
    """A ranking, JSON-ready: settings, tests and filters, and the latents of its plan.

    Args:
        plan: made from the ranking by `plan_from_ranking`.
        explain: latents about which everything known is added under `explain`; those of the plan
            when empty; no such key when None.
    """
    config = ranking.config
    lens = {latent.id: list(latent.lens) for latent in plan.latents}
    plain = next((trial for trial in ranking.trials if trial.latent is None), None)
    document = {
        "schema_version": 1,
        "task": {"name": ranking.task.name, "hash": ranking.task.hash},
        "model": {"name": lm.name, "hash": lm.fingerprint},
        "sae": {"source": sae.source, "sha256": sae.sha256},
        "layer": ranking.point.layer,
        "site": ranking.point.site,
        "by": config.resolved_by,
        "read": config.read,
        "position": config.position,
        "positives": ranking.positives,
        "negatives": ranking.negatives,
        "replies_used": ranking.replies_used,
        "test": significance_of(config.resolved_by),
        "discoveries": {
            "max_fdr": config.max_fdr,
            "latents": int((ranking.q <= config.max_fdr).sum()),
        },
        "dropped": list(config.drop),
        "filters": ranking.dropped(),
        "stability": ranking.stability.summary(),
        "overlap": ranking.overlap(),
        "shuffled": None if ranking.shuffled is None else ranking.shuffled.summary(),
        # The unsteered model on the contents that `causal` steers on.
        "unsteered": plain and {"successes": plain.successes, "n": plain.n},
        "contents_used": [
            min(config.contents, len(ranking.task.contents["train"])),
            sum(len(texts) for texts in ranking.task.contents.values()),
        ],
        "excluded": ranking.excluded,
        "latents": [
            {"rank": place, **ranking.explain(i), "lens": lens[i]}
            for place, i in enumerate(plan.ids, 1)
        ],
        "plan": None,
    }
    if explain is not None:
        document["explain"] = [
            {**ranking.explain(i), "lens": lens.get(i) or lens_tokens(lm, sae.W_dec[i])}
            for i in explain or plan.ids
        ]
    return document


def save_ranking(
    folder: str | Path,
    lm: LanguageModel,
    sae: SAE,
    ranking: Ranking,
    plan: Plan,
    explain: Sequence[int] | None = None,
    latent_pages: Sequence[str | Path] = (),
) -> dict[str, Any]:
    """Write a plan, the `ranking.json` that explains it, and `scores.safetensors`.

    The last holds every column of the ranking, each `[d_sae]`: all scores that were computed, p, q,
    mu, sigma, and the rates at which each latent is active elsewhere.

    Each latent's `page` is that of pages which `latents` wrote, relative to the folder: of those in
    `latent_pages`, or found beside the folder or in the SAE's; None where there is none. Raises
    UserError for a folder in `latent_pages` without pages.

    Returns:
        What `ranking.json` holds: `ranking_document`, with the path of the plan.
    """
    folder = Path(folder)
    near: list[str | Path] = [folder.parent, *([sae.source] if sae.source else [])]
    pages = find_latent_pages(latent_pages, near, folder)
    document = ranking_document(lm, sae, ranking, plan, explain)
    for row in (*document["latents"], *document.get("explain", ())):
        row["page"] = link(pages, sae.sha256, row["id"])
    document["plan"] = save_plan(plan, folder)
    write_json(folder / "ranking.json", document)
    columns = {
        **ranking.columns,
        "p": ranking.p,
        "q": ranking.q,
        "mu": ranking.mu,
        "sigma": ranking.sigma,
        "control_rate": ranking.control_rate,
        "template_rate": ranking.template_rate,
    }
    write_tensors(folder / "scores.safetensors", columns)
    return document
