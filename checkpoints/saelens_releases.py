"""Pretrained SAEs that SAELens lists: the only module that imports `sae_lens`."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from saesteer.checkpoints import files
from saesteer.checkpoints.errors import UserError, reason_of
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

    loaded = hub_call(
        read,
        f"`sae` {text}",
        "give a folder, or a RELEASE:ID from SAELens' list of pretrained SAEs",
    )
    config = loaded.cfg.to_dict()
    config["metadata"] = files.plain(config.get("metadata") or {})
    spec = saelens.spec_from_config(config, text)
    tensors = {name: tensor.detach().clone() for name, tensor in loaded.state_dict().items()}
    tensors = saelens.own_names(tensors, spec, text)
    check_tensors(tensors, spec, f"`sae` {text}")
    fields: dict[str, Any] = {**tensors, "source": text, "format": "saelens"}
    sae = SAE(spec=spec, **fields)
    return dataclasses.replace(sae, sha256=tensors_sha256(sae.tensors()))


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
