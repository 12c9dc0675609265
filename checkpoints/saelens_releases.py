"""Pretrained SAEs that SAELens lists: the only module that imports `sae_lens`."""

import contextlib
import dataclasses
import difflib
import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saesteer.checkpoints import files
from saesteer.checkpoints.errors import UserError, meant, reason_of
from saesteer.checkpoints.formats import saelens
from saesteer.checkpoints.model_files import hub_call, quiet
from saesteer.checkpoints.sparse_autoencoder import SAE, check_tensors, tensors_sha256


class SAELensMissing(UserError):
    """`sae_lens` cannot be imported."""


def load_release(text: str) -> SAE:
    """Open `RELEASE:ID` with `sae_lens.SAE.from_pretrained`, whose loaders know every release.

    Raises:
        UserError: sae_lens cannot be imported, or the release cannot be fetched or read.
    """
    release, sae_id = text.split(":", 1)
    try:
        sae_lens = import_sae_lens()
    except SAELensMissing as error:
        raise UserError(f"`sae` {text}: {error}, or give a folder") from error

    def read() -> Any:
        with _tensors_only():
            return sae_lens.SAE.from_pretrained(release, sae_id, device="cpu")

    try:
        loaded = hub_call(
            read,
            f"`sae` {text}",
            "give a folder, or a RELEASE:ID from SAELens' list of pretrained SAEs",
        )
    except UserError as error:
        if wrong := _not_listed(release, sae_id):
            raise UserError(f"`sae` {text}: {wrong}") from error
        raise
    config = loaded.cfg.to_dict()
    config["metadata"] = files.plain(config.get("metadata") or {})
    spec = saelens.spec_from_config(config, text)
    tensors = {name: tensor.detach().clone() for name, tensor in loaded.state_dict().items()}
    tensors = saelens.own_names(tensors, spec, text)
    check_tensors(tensors, spec, f"`sae` {text}")
    fields: dict[str, Any] = {**tensors, "source": text, "format": "saelens"}
    sae = SAE(spec=spec, **fields)
    return dataclasses.replace(sae, sha256=tensors_sha256(sae.tensors()))


def without_id(text: str) -> str | None:
    """What to say of a text that names a release of SAELens, or its repository, and no SAE in it.

    None for any other text.
    """
    listed = _listed()
    if text in listed:
        ids = listed[text].ids
        return (
            f"is a release of {len(ids)} SAEs: write RELEASE:ID, such as "
            f"{text}:{ids[len(ids) // 2]}"
        )
    releases = [name for name, release in listed.items() if release.repo == text]
    if releases:
        ids = listed[releases[0]].ids
        return (
            f"is a repository of SAEs, which SAELens lists as {', '.join(releases[:6])}: write "
            f"RELEASE:ID, such as {releases[0]}:{ids[len(ids) // 2]}"
        )
    near = meant(text, listed)
    return f"does not exist{near}" if near else None


def _not_listed(release: str, sae_id: str) -> str | None:
    """Why SAELens' list has no SAE of that name; None where it has, or there is no list."""
    listed = _listed()
    if release in listed:
        ids = listed[release].ids
        if sae_id in ids:
            return None
        near = difflib.get_close_matches(sae_id, ids, n=3, cutoff=0.3) or ids[:3]
        return (
            f"the release has {len(ids)} SAEs and none of that id; the nearest are "
            f"{', '.join(near)}: give one of them"
        )
    if not listed or "/" in release:  # a repository is read without a list
        return None
    return (
        f"SAELens lists no release {release}{meant(release, listed)}: give a folder, or a "
        "RELEASE:ID from its list of pretrained SAEs"
    )


@dataclasses.dataclass(frozen=True)
class _Release:
    repo: str
    ids: list[str]


@functools.cache
def _listed() -> dict[str, _Release]:
    """The releases in the list that lies in the package; nothing where it cannot be read."""
    import yaml

    found = importlib.util.find_spec("sae_lens")
    for folder in (found and found.submodule_search_locations) or ():
        try:
            with open(Path(folder) / "pretrained_saes.yaml", encoding="utf-8") as file:
                content = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            return {
                str(name): _Release(str(row["repo_id"]), [str(sae["id"]) for sae in row["saes"]])
                for name, row in content.items()
                if row["saes"]
            }
        except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
            continue  # another version's list, in another form: messages do without it
    return {}


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Have `torch.load`, which SAELens calls on `.pt` files, refuse pickles that run code.

    That is torch's default, which a variable of the environment undoes.
    """
    undone = os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    try:
        yield
    finally:
        if undone is not None:
            os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = undone


def import_sae_lens() -> Any:
    """Import sae_lens. Raises SAELensMissing, also when its dependencies have other versions."""
    with quiet():
        try:
            import sae_lens
        except Exception as error:  # whatever its own imports raise
            raise SAELensMissing(
                f"sae_lens cannot be imported ({reason_of(error)}): install versions that fit "
                "together (pip install -U sae-lens transformer-lens)"
            ) from error
    return sae_lens
