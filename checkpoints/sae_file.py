"""SAEs on disk: opened in any format, written in the SAELens >= 6 layout.

The formats are in `saesteer.checkpoints.formats`, what an SAE computes in
`saesteer.checkpoints.sparse_autoencoder`.
"""

import re
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints import hub, sae_folder
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.formats import saelens
from saesteer.checkpoints.sae_spec import SAESpec, hook_name_for
from saesteer.checkpoints.saelens_releases import load_release, without_id
from saesteer.checkpoints.sparse_autoencoder import SAE

__all__ = ["SAE", "SAESpec", "hook_name_for", "load_sae", "save_sae"]

_SHARED = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+):(?P<id>.+)")


def save_sae(
    folder: str | Path,
    spec: SAESpec,
    W_enc: Float[Tensor, "d_model d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_out"],
    b_dec: Float[Tensor, " d_out"],
    threshold: Float[Tensor, " d_sae"] | None = None,
    b_mag: Float[Tensor, " d_sae"] | None = None,
    r_mag: Float[Tensor, " d_sae"] | None = None,
    W_skip: Float[Tensor, "d_out d_model"] | None = None,
) -> str:
    """Write an SAE that `sae_lens.SAE.load_from_disk` opens; returns the weights file's SHA-256.

    Tensors are written in `spec.dtype`. cfg.json's `metadata` holds `spec.metadata` and the
    names in the spec; SAELens' own activation store also needs `context_size` and `prepend_bos`
    there. The folder is made if missing; each of the two files appears whole or not at all. An
    architecture that SAELens does not have is written too, and opens with `load_sae`.

    Raises:
        UserError: shapes that do not fit the spec, values that are not finite, a full disk.
    """
    sae = SAE(
        spec=spec,
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        threshold=threshold,
        b_mag=b_mag,
        r_mag=r_mag,
        W_skip=W_skip,
    )
    return saelens.save(Path(folder), sae)


def load_sae(
    path_or_release: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    *,
    setting: str = "sae",
) -> SAE:
    """Open an SAE: a folder or weights file in any format of `saesteer.checkpoints.formats`;
    `RELEASE:ID` from SAELens' list on the Hub; or what `push` shared, as `REPO@REVISION:ID` or
    `FOLDER:ID`.

    A revision of 40 hexadecimal digits is a commit, which identifies the weights permanently.
    The format is recognised by the names of files and tensors. With `dtype` None the dtype that
    the file states is kept. `setting` is what errors call `path_or_release` by.

    Raises:
        UserError: nothing there, a file missing, cut short or unsafe, shapes or values that cannot
            be, an architecture or normalisation we do not compute, a release that cannot be
            fetched.
    """
    text = str(path_or_release)
    path = Path(text).expanduser()
    if sae_folder.is_there(path, text):
        sae = sae_folder.read_sae(path, text)
    elif shared := _SHARED.fullmatch(text):
        sae = hub.from_pretrained(shared["repo"], shared["id"], revision=shared["revision"])
    elif _holds_shared(text):
        folder, _, sae_id = text.rpartition(":")
        sae = hub.from_pretrained(folder, sae_id)
    elif re.fullmatch(r"[\w./-]+:.+", text) and text[0] not in "./":
        sae = load_release(text)
    else:
        if listed := without_id(text):
            raise UserError(f"`{setting}` {text} {listed}")
        raise UserError(
            f"`{setting}` {text} does not exist: give a folder with cfg.json and "
            "sae_weights.safetensors, a folder or file in another format, RELEASE:ID of sae_lens, "
            "or REPO@REVISION:ID"
        )
    return sae.to(device, dtype)


def _holds_shared(text: str) -> bool:
    """Whether a text is FOLDER:ID of a folder that `push` wrote."""
    folder, colon, _ = text.rpartition(":")
    return bool(colon) and (Path(folder).expanduser() / "saes.json").is_file()
