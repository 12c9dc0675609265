"""Pretrained SAEs that SAELens lists. The only module that needs `sae_lens` to open an SAE."""

import dataclasses
from typing import Any

from saesteer.checkpoints import files
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.formats import saelens
from saesteer.checkpoints.model_files import hub_call, quiet
from saesteer.checkpoints.sparse_autoencoder import SAE, check_tensors, tensors_sha256


def load_release(text: str) -> SAE:
    """`RELEASE:ID` through `sae_lens.SAE.from_pretrained`, whose loaders know every release.

    Raises:
        UserError: sae_lens cannot be imported, or the release cannot be fetched or read.
    """
    release, sae_id = text.split(":", 1)
    with quiet():
        sae_lens = _import_sae_lens(text)
        loaded = hub_call(
            lambda: sae_lens.SAE.from_pretrained(release, sae_id, device="cpu"),
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


def _import_sae_lens(text: str) -> Any:
    try:
        import sae_lens
    except Exception as error:  # its own imports break in many ways with other versions around it
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"`sae` {text}: sae_lens, which opens a RELEASE:ID, cannot be imported ({reason}): "
            "install versions that fit together (pip install -U sae-lens transformer-lens), or "
            "give a folder"
        ) from error
    return sae_lens
