"""Which rankings and plans hold a latent: read from the folders that `rank` and others write."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.files import read_json
from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.reading.card import TaskMark
from saesteer.steering.plans.plan import Plan
from saesteer.steering.plans.plan_file import load_plan


def planned_latents(plan: Plan, sae: SAE) -> tuple[int, ...]:
    """The latents of a plan that are latents of this SAE, in the plan's order, each once.

    Raises UserError where there are none.
    """
    found = [latent.id for part in plan.parts if _is_of(part.sae, sae) for latent in part.latents]
    if not found:
        sources = ", ".join(sorted({part.sae.source for part in plan.parts}))
        raise UserError(
            f"`plan` holds no latent of `sae` {sae.source}: it was made with {sources or 'no SAE'}"
        )
    return tuple(dict.fromkeys(found))


def task_marks(folders: Sequence[str | Path], sae: SAE) -> dict[int, list[TaskMark]]:
    """Of each latent the rankings among these folders that hold it.

    A folder holds `ranking.json`, as `rank` writes it, or else a plan, whose latents count in its
    order. Raises UserError for a folder with neither, or one made with another SAE.
    """
    marks: dict[int, list[TaskMark]] = {}
    for given in folders:
        folder = Path(given).expanduser()
        own = _of_ranking(folder, sae) if (folder / "ranking.json").is_file() else None
        for mark, latent in own if own is not None else _of_plan(folder, sae):
            marks.setdefault(latent, []).append(mark)
    return marks


def _of_ranking(folder: Path, sae: SAE) -> list[tuple[TaskMark, int]]:
    document = read_json(folder / "ranking.json")
    try:
        made_with = document["sae"]
        if made_with["sha256"] != sae.sha256:
            raise UserError(
                f"{folder} ranks latents of {made_with['source']}, not of `sae` {sae.source}: give "
                "rankings of this SAE"
            )
        return [
            (
                TaskMark(
                    task=str(document["task"]["name"]),
                    rank=int(row["rank"]),
                    score=None if row["score"] is None else float(row["score"]),
                    by=str(document["by"]),
                    folder=str(folder),
                ),
                int(row["id"]),
            )
            for row in document["latents"]
        ]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{folder / 'ranking.json'} is no ranking: make it again") from None


def _of_plan(folder: Path, sae: SAE) -> list[tuple[TaskMark, int]]:
    plan = load_plan(folder)
    scores = {
        latent.id: latent.score
        for part in plan.parts
        if _is_of(part.sae, sae)
        for latent in part.latents
    }
    task = plan.task.name if plan.task is not None else folder.name
    return [
        (TaskMark(task, rank, scores[latent], "", str(folder)), latent)
        for rank, latent in enumerate(planned_latents(plan, sae), 1)
    ]


def _is_of(made_with: Any, sae: SAE) -> bool:
    """Whether a part's SAE is this one: by the hash of its weights, or its source without one."""
    if made_with.sha256 and sae.sha256:
        return bool(made_with.sha256 == sae.sha256)
    return bool(made_with.source == sae.source)
