"""Plans of several rankings to sweep over, and the folder that a sweep writes."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from saesteer.checkpoints.files import plain, write_json, write_text
from saesteer.checkpoints.sae_file import SAE, load_sae
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.steering.doses.sweep import Sweep
from saesteer.steering.plans.plan import Plan
from saesteer.steering.plans.plan_file import save_plan
from saesteer.steering.ranking.rank import RankConfig, plan_from_ranking, rank
from saesteer.steering.reports.sweep_charts import pareto_chart
from saesteer.steering.tasks.task import Task, load_task


def ranked_plans(
    model: str | LanguageModel,
    saes: Sequence[str | Path | SAE],
    task: str | Path | Task,
    *,
    position: Sequence[str] = (),
    read: Sequence[str] = (),
    by: Sequence[str] = (),
    top: int = 15,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = no_progress,
) -> dict[str, Plan]:
    """Rank with every SAE and every combination of settings, and make a plan of each ranking.

    Args:
        position, read, by: values of these fields of `RankConfig` to try; empty uses the default.
        top: latents in each plan; at least the largest k of the sweep.

    Returns:
        The plans by name: the layer, or the SAE's folder where SAEs share a layer, and the values.

    Raises what `rank` does.
    """
    lm = as_language_model(model, device=device, dtype=dtype)
    task = task if isinstance(task, Task) else load_task(task)
    opened = [sae if isinstance(sae, SAE) else load_sae(str(sae)) for sae in saes]
    layers = [sae.spec.layer for sae in opened]
    plans: dict[str, Plan] = {}
    for sae in opened:
        for chosen, config in rank_settings(position, read, by, seed):
            ranking = rank(lm, sae.to(lm.device), task, config, progress=progress)
            plan = plan_from_ranking(lm, sae, ranking, top=top)
            alone = layers.count(sae.spec.layer) == 1
            what = f"layer {plan.layer}" if alone else Path(sae.source).name
            plans[" ".join([what, *chosen.values()])] = plan
    return plans


def rank_settings(
    position: Sequence[str], read: Sequence[str], by: Sequence[str], seed: int
) -> list[tuple[dict[str, str], RankConfig]]:
    """Every combination of these fields of a `RankConfig` (empty: its default), and the config.

    Raises UsageError for values that are not allowed, or not together.
    """
    found = []
    for values in product(position or (None,), read or (None,), by or (None,)):
        named = zip(("position", "read", "by"), values, strict=True)
        chosen = {name: value for name, value in named if value is not None}
        found.append((chosen, RankConfig(seed=seed, **chosen)))  # type: ignore[arg-type]
    return found


def save_sweep(
    folder: str | Path, lm: LanguageModel, found: Sweep, *, ranked: str | Path | None = None
) -> dict[str, Any]:
    """Write the chosen plan, `sweep.json` with every trial, and the chart `sweep.svg`.

    Args:
        ranked: the folder of the plan that was swept over. Its `ranking.json`, if any, is copied,
            so that a report of the chosen plan can show it.

    Returns:
        What `sweep.json` holds: `Sweep.document` and the model.
    """
    folder = Path(folder)
    document = sweep_document(lm, found)
    save_plan(found.plan(), folder)
    write_json(folder / "sweep.json", document)
    write_text(folder / "sweep.svg", pareto_chart(plain(document)))
    source = None if ranked is None else Path(ranked).expanduser() / "ranking.json"
    if source is not None and source.is_file():
        write_text(folder / "ranking.json", source.read_text(encoding="utf-8"))
    return document


def sweep_document(lm: LanguageModel, found: Sweep) -> dict[str, Any]:
    """`Sweep.document` with the model that was steered."""
    return {"model": {"name": lm.name, "hash": lm.fingerprint}, **found.document()}
