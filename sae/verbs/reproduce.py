"""`reproduce`: repeats a recorded training or harvest and compares the results."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.files import claim_output, plain, read_json, read_jsonl, read_tensors
from saesteer.checkpoints.strict_fields import read_fields
from saesteer.sae.config import Progress, TrainConfig
from saesteer.sae.runs.bars import show_progress
from saesteer.sae.verbs.reproduce_harvest import (
    compare_shards,
    harvest_config,
    recorded_harvest,
    repeat_harvest,
    wrong_config,
)

# What settings were in runs from before they existed, where that is not their default.
_BEFORE_RECORDED = {"held_out_share": 0.0}
_TIMINGS = ("tokens_per_second", "stall_model", "stall_trainer", "seconds")


def reproduce(
    run: str | Path,
    out: str | Path | None = None,
    *,
    model: str | None = None,
    activations: str | Path | Sequence[str | Path] | None = None,
    force: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = show_progress,
) -> dict[str, Any]:
    """Repeat the training whose `run.json` is in `run`, and compare weights and metrics; or the
    harvest whose `manifest.json` is there, and compare every row.

    The same machine, versions and inputs give the same bits; what differs between then and now is
    listed. The number of threads is set to the recorded one, since sums depend on it.

    Args:
        run: the folder of a finished run, or of one SAE of it.
        out: keeps the repetition; by default it goes to a temporary folder.
        model, activations: where the recorded ones are now, if they have moved.
        force: replace an earlier run in `out`.
        trust_remote_code: run Python files that come with the model, see `load_model`.

    Returns:
        `equal` (every SAE and every metric, to the bit), `saes` (for each: `weights_equal`,
        `max_abs_difference` by tensor, `metrics_equal`, `first_differing_step`, `final` then and
        now; of a harvest instead `shards`, what `compare_shards` gives) and
        `differences` of inputs and environment, each with `what`, `then` and `now`.

    Raises:
        UserError: no finished training or harvest in `run`, or one that lacks what a repetition
        needs.
    """
    harvested = recorded_harvest(Path(run).expanduser())
    if harvested is not None:
        if activations is not None:
            raise UsageError("`activations`: this run is a harvest, give `model`")
        return _again(
            out,
            force,
            lambda place: _reproduce_harvest(
                run, harvested, place, model, trust_remote_code, progress
            ),
        )
    before = _recorded(Path(run).expanduser())
    first = next(iter(before.values()))
    config = train_config(first["config"], str(run))
    recipe = first.get("recipe")
    if not isinstance(recipe, dict) or not {"model", "activations", "device"} <= recipe.keys():
        raise UserError(f"{run}: its run.json names no recipe: it was made before runs kept one")

    def work(place: Path) -> dict[str, Any]:
        again = _repeat(
            recipe, config, place, first, model, activations, trust_remote_code, progress
        )
        return _compare(before, again, Path(run))

    return _again(out, force, work)


def _again(
    out: str | Path | None, force: bool, work: Callable[[Path], dict[str, Any]]
) -> dict[str, Any]:
    """The result of `work` in the folder `out`, or in a temporary one."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="saesteer-reproduce-") as place:
            return {**work(Path(place)), "again": None}
    folder = claim_output(out, force=force)
    return {**work(folder), "again": str(folder)}


def _reproduce_harvest(
    run: str | Path,
    then: Mapping[str, Any],
    place: Path,
    model: str | None,
    trust_remote_code: bool,
    progress: Progress,
) -> dict[str, Any]:
    config = harvest_config(then, str(run))
    with _threads(_recorded_threads(then)):
        now = repeat_harvest(then, config, place, model, trust_remote_code, progress)
    comparison = compare_shards(Path(run).expanduser(), place)
    return {
        "run": str(run),
        "equal": comparison["equal"],
        "shards": comparison,
        "differences": _all_differences(then, now),
    }


def train_config(recorded: Any, where: str) -> TrainConfig:
    """The `TrainConfig` that a `run.json` holds. Raises UserError naming what does not fit."""
    if isinstance(recorded, dict):
        recorded = {**_BEFORE_RECORDED, **recorded}
    return read_fields(TrainConfig, recorded, wrong_config(where, "run.json"))


def _recorded(folder: Path) -> dict[Path, dict[str, Any]]:
    """The `run.json` of each finished SAE in a folder, by the SAE's folder."""
    places = [folder] if (folder / "sae_weights.safetensors").exists() else []
    places = places or sorted(path.parent for path in folder.glob("layer-*/run.json"))
    if not places and (folder / "run.json").exists():
        places = [folder]
    runs = {}
    for place in places:
        run = read_json(place / "run.json")
        if not isinstance(run, dict) or run.get("verb") != "train":
            verb = run.get("verb") if isinstance(run, dict) else None
            raise UserError(
                f"{place} holds a run of {verb!r}; only those of train and harvest are repeated"
            )
        if run.get("complete") is not True or not isinstance(run.get("sae"), dict):
            raise UserError(f"the run in {place} was not finished: finish it with `resume` first")
        if run.get("extended"):
            raise UserError(
                f"the run in {place} was made longer after it had begun, which is not repeated: "
                "train once with all its `tokens`"
            )
        runs[place] = run
    if not runs:
        raise UsageError(f"{folder} holds no run.json: give a folder that train or harvest wrote")
    return runs


def _repeat(
    recipe: Mapping[str, Any],
    config: TrainConfig,
    folder: Path,
    first: Mapping[str, Any],
    model: str | None,
    activations: str | Path | Sequence[str | Path] | None,
    trust_remote_code: bool,
    progress: Progress,
) -> dict[Path, dict[str, Any]]:
    """Train again; the new `run.json` of each SAE by its folder."""
    from saesteer.sae.model.language_model import load_model
    from saesteer.sae.verbs.train import train

    source: dict[str, Any] = {}
    device = str(recipe["device"])
    if recipe["activations"] is not None:
        if model is not None:
            raise UsageError("`model`: this run was trained from shards, give `activations`")
        source["activations"] = activations or recipe["activations"]
    else:
        if activations is not None:
            raise UsageError("`activations`: this run was trained live, give `model`")
        source["replies"] = [str(text) for text in recipe.get("replies") or ()]
        source["model"] = load_model(
            model or str(recipe["model"]),
            device=device,
            dtype=str(recipe.get("lm_dtype") or "auto"),
            blocks_path=recipe.get("blocks"),
            trust_remote_code=trust_remote_code,
        )
    with _threads(_recorded_threads(first)):
        runs = train(folder, config, device=device, progress=progress, **source)
    return {Path(run["folder"]): run for run in runs}


def _recorded_threads(record: Mapping[str, Any]) -> int | None:
    machine = record.get("machine")
    threads = machine.get("threads") if isinstance(machine, dict) else None
    return threads if isinstance(threads, int) else None


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` threads inside the block; None changes nothing."""
    import torch

    before = torch.get_num_threads()
    if count is not None and count > 0:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _compare(
    before: Mapping[Path, dict[str, Any]],
    again: Mapping[Path, dict[str, Any]],
    run: Path,
) -> dict[str, Any]:
    saes = []
    for place, then in before.items():
        # For a run of one SAE the folder's name does not matter.
        same = [path for path in again if len(again) == 1 or path.name == place.name]
        if not same:
            raise UserError(f"{place}: the repetition made no SAE of that name; restore its name")
        saes.append(_compare_sae(place, then, same[0], again[same[0]]))
    first, now = next(iter(before.values())), next(iter(again.values()))
    return {
        "run": str(run),
        "equal": all(sae["weights_equal"] and sae["metrics_equal"] for sae in saes),
        "saes": saes,
        "differences": _all_differences(first, now),
    }


def _all_differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What differs in inputs and environment."""
    differences = []
    for part in ("model", "data", "recipe", "versions", "git_revision", "machine"):
        differences += _differences(part, plain(then.get(part)), plain(now.get(part)))
    return differences


def _compare_sae(
    place: Path, then: Mapping[str, Any], new: Path, now: Mapping[str, Any]
) -> dict[str, Any]:
    old_tensors = read_tensors(place / "sae_weights.safetensors")
    new_tensors = read_tensors(new / "sae_weights.safetensors")
    largest: dict[str, float | None] = {}
    for name in sorted(old_tensors.keys() | new_tensors.keys()):
        one, two = old_tensors.get(name), new_tensors.get(name)
        if one is None or two is None or one.shape != two.shape:
            largest[name] = None
        else:
            largest[name] = float((one.double() - two.double()).abs().max()) if len(one) else 0.0
    old_rows, new_rows = _rows(place), _rows(new)
    step = None
    if old_rows != new_rows:
        pairs = zip(old_rows, new_rows, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        first = min(len(old_rows), len(new_rows)) if first is None else first
        longer = old_rows if first < len(old_rows) else new_rows
        step = longer[first].get("step")
    finals = [then.get("final") or {}, now.get("final") or {}]
    keys = [key for key in finals[1] if key not in _TIMINGS]
    return {
        "folder": str(place),
        "weights_equal": _bits(old_tensors) == _bits(new_tensors),
        "max_abs_difference": largest,
        "metrics_equal": old_rows == new_rows,
        "first_differing_step": step,
        "final": {key: [finals[0].get(key), finals[1].get(key)] for key in keys},
    }


def _bits(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The exact content of tensors: 0 and -0 differ, and so do different NaN bits."""
    import torch

    return {
        name: (str(t.dtype), tuple(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log without its timings."""
    rows = read_jsonl(folder / "metrics.jsonl")
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{folder / 'metrics.jsonl'} holds lines that are no objects; restore it")
    return [{key: row[key] for key in row if key not in _TIMINGS} for row in rows]


def _differences(what: str, then: Any, now: Any) -> list[dict[str, Any]]:
    """Where two JSON values differ, each with its dotted name, `then` and `now`."""
    if then == now:
        return []
    if isinstance(then, dict) and isinstance(now, dict):
        differences = []
        for key in sorted(then.keys() | now.keys()):
            differences += _differences(f"{what}.{key}", then.get(key), now.get(key))
        return differences
    return [{"what": what, "then": then, "now": now}]
