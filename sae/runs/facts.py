"""Facts that identify a run, its model and its text, so that a later run can be compared."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.files import plain
from saesteer.sae.model.language_model import LanguageModel


def check_same_run(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    folder: Path,
    usual: Mapping[str, Any] | None = None,
    read_the_same: Callable[[], bool] = lambda: False,
) -> None:
    """Refuse to resume a run whose settings, text or model differ from the ones before.

    Compares `config` key by key, then `layers`, `dtype`, `data` and the model's weights and dtype,
    as far as `now` has them. A setting that `before` lacks is from after it was made, and was what
    `usual` says. Where the text differs, `read_the_same` says whether the part that was read does
    not. Raises UserError naming the first setting that differs.
    """
    old, new = dict(before.get("config") or {}), plain(now.get("config") or {})
    if old:
        old = {"bos": "auto", **plain(dict(usual or {})), **old}
    for key in ("layers", "dtype"):
        if key in now:
            old[key], new[key] = before.get(key), plain(now[key])
    named = {"layers": "`layer`", "dtype": "`store_dtype`"}
    for key, value in new.items():
        if old.get(key) != value:
            name = named.get(key, f"`{key}`")
            raise UserError(
                f"`resume`: {folder} was made with {name} {old.get(key)}, now it is {value}: give "
                "what the first run was given, or another `out`"
            )
    first, second = before.get("model") or {}, now["model"]
    for key in ("hash", "dtype"):
        if first.get(key) != second.get(key):
            raise UserError(
                f"`resume`: {folder} was made with a `model` of {key} {first.get(key)}, now it is "
                f"{second.get(key)}: give the model of the first run, or another `out`"
            )
    if not _same(before.get("data"), plain(now["data"])) and not read_the_same():
        raise UserError(
            f"`resume`: {folder} was made from other text or replies than those there now, in what "
            "was read before it stopped: restore them (rows that come later may be mended in their "
            "places; one row added or deleted changes the order of all), or give another `out`"
        )


def _same(before: Any, now: Any) -> bool:
    """Whether two records of text agree in all that the earlier one says."""
    if isinstance(before, dict) and isinstance(now, dict):
        return all(key in now and _same(value, now[key]) for key, value in before.items())
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(_same, before, now))
    return bool(before == now)


def model_facts(lm: LanguageModel) -> dict[str, Any]:
    """A model's identity as it is written into manifests, SAEs, plans and runs."""
    return {
        "name": lm.name,
        "hash": lm.fingerprint,
        "n_layers": lm.n_layers,
        "d_model": lm.d_model,
        "dtype": str(lm.dtype).removeprefix("torch."),
    }


def as_given(model: str) -> str:
    """A model's name as a record keeps it: a local path is made absolute."""
    return str(Path(model).absolute()) if Path(model).exists() else model
