"""The part of `reproduce` that repeats a recorded harvest and compares its shards."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.files import read_json
from saesteer.checkpoints.places import Place
from saesteer.checkpoints.shards import MANIFEST, ShardReader
from saesteer.checkpoints.strict_fields import read_fields
from saesteer.sae.config import HarvestConfig, Progress, TextConfig


def recorded_harvest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished harvest of one process; None when there is no harvest.

    Raises UserError for one that cannot be repeated.
    """
    if not (folder / MANIFEST).is_file():
        return None
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("complete") is not True:
        raise UserError(f"the harvest in {folder} was not finished: finish it with `resume` first")
    recipe = manifest.get("recipe")
    if not isinstance(recipe, dict) or not {"model", "device"} <= recipe.keys():
        raise UserError(f"{folder}: its manifest names no recipe: it was made before harvests did")
    if manifest.get("processes", 1) != 1:
        raise UserError(
            f"{folder} was written by {manifest['processes']} processes, each with shards of its "
            "own; only harvests of one process are repeated"
        )
    return manifest


def wrong_config(where: str, file: str) -> str:
    """The beginning of an error message about the config in a record."""
    return f"{where}: restore {file}, or use the saesteer that wrote it; its config is wrong"


def harvest_config(manifest: Mapping[str, Any], where: str) -> HarvestConfig:
    """The settings that a manifest holds. Raises UserError naming what does not fit."""
    wrong = wrong_config(where, MANIFEST)
    recorded = manifest.get("config")
    if not isinstance(recorded, dict):
        raise UserError(f"{wrong}: it is not an object")
    names = {field.name for field in fields(TextConfig)}
    settings = {
        **{key: value for key, value in recorded.items() if key not in names},
        "text": {key: value for key, value in recorded.items() if key in names},
        "layers": manifest.get("layers"),
        "store_dtype": manifest.get("dtype"),
        "shard_tokens": manifest.get("shard_tokens"),
    }
    return read_fields(HarvestConfig, settings, wrong)


def repeat_harvest(
    manifest: Mapping[str, Any],
    config: HarvestConfig,
    folder: Path,
    model: str | None,
    trust_remote_code: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Harvest again; returns the new manifest.

    `model` is where the recorded model is now, if it has moved.
    """
    from saesteer.sae.model.language_model import load_model
    from saesteer.sae.verbs.harvest import harvest

    recipe = manifest["recipe"]
    device = str(recipe["device"])
    lm = load_model(
        model or str(recipe["model"]),
        device=device,
        dtype=str(recipe.get("lm_dtype") or "auto"),
        blocks_path=recipe.get("blocks"),
        trust_remote_code=trust_remote_code,
    )
    replies = [str(text) for text in recipe.get("replies") or ()]
    # The model is used for nothing else, so weights that are not needed can be freed.
    return harvest(lm, folder, config, replies=replies, consume_model=True, progress=progress)


def compare_shards(then: Path, now: Path) -> dict[str, Any]:
    """Compare two harvests row by row. Shards may be cut at other rows, as after an interruption.

    Returns `equal`, `shards_equal` (the files too), `tokens` then and now, `tokens_equal`
    (the token ids), `first_differing_row` and `max_abs_difference` of an activation.
    """
    one, two = ShardReader(then), ShardReader(now)
    if one.places != two.places:
        raise UsageError(f"{then} and {now} hold other layers: {one.places} and {two.places}")
    first, largest, ids_equal = None, 0.0, one.tokens == two.tokens
    for place in one.places:
        row = 0
        for (a, a_ids), (b, b_ids) in _pieces(one, two, place):
            differing = (a.view(torch.uint8) != b.view(torch.uint8)).flatten(1).any(dim=1)
            if bool(differing.any()):
                at = row + int(differing.nonzero()[0])
                first = at if first is None else min(first, at)
                largest = max(largest, float((a.double() - b.double()).abs().max()))
            ids_equal = ids_equal and torch.equal(a_ids, b_ids)
            row += len(a)
    hashes = [
        [(entry["file"], entry["sha256"]) for entry in reader.manifest["shards"]]
        for reader in (one, two)
    ]
    return {
        "equal": first is None and ids_equal,
        "shards_equal": hashes[0] == hashes[1],
        "tokens": [one.tokens, two.tokens],
        "tokens_equal": ids_equal,
        "first_differing_row": first,
        "max_abs_difference": largest,
    }


def _pieces(
    one: ShardReader, two: ShardReader, place: Place
) -> Iterator[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """The rows of both side by side, as far as both go, in pieces that lie within one shard."""
    numbers = [0, 0]
    rest: list[tuple[Tensor, Tensor] | None] = [None, None]
    while True:
        for side, reader in enumerate((one, two)):
            held = rest[side]
            while held is None or not len(held[0]):
                if numbers[side] == len(reader):
                    return
                held = rest[side] = reader.shard(numbers[side], *place)
                numbers[side] += 1
        left, right = rest
        assert left is not None and right is not None
        count = min(len(left[0]), len(right[0]))
        yield (left[0][:count], left[1][:count]), (right[0][:count], right[1][:count])
        rest = [(left[0][count:], left[1][count:]), (right[0][count:], right[1][count:])]
