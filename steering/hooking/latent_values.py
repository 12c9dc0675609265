"""The values of some latents at each token, from their own encoder columns where that is possible.

A latent of a standard, JumpReLU or linear encoder depends only on its own column, so n latents cost
O(n d_model) per token. A TopK latent also has to be among the k largest of all, which needs the
whole encoder, and so the SAE itself.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE, load_sae
from saesteer.checkpoints.sparse_autoencoder import token_divisor
from saesteer.sae.model.sae_places import is_plain
from saesteer.steering.hooking.gates import parse_gate
from saesteer.steering.plans.from_sae import encoder_columns
from saesteer.steering.plans.part import PlanPart
from saesteer.steering.plans.plan import Plan

# At most this many numbers of dense latents exist at a time (64 MiB in float32).
_ENCODE_NUMBERS = 2**24


class LatentReader:
    """Reads the latents `ids` from residual vectors, in float32."""

    def __init__(
        self,
        ids: tuple[int, ...],
        columns: dict[str, Tensor] | None,
        sae: SAE | None,
        linear: bool = False,
        normalization: str = "none",
    ) -> None:
        self._ids = list(ids)
        self._tensors = {name: tensor.float() for name, tensor in (columns or {}).items()}
        self._sae = sae
        self._linear = linear
        self._normalization = normalization

    def read(self, h: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens n"]:
        """The latents' values, in the order of the ids."""
        if self._sae is None:
            t = self._tensors = on_device(self._tensors, h.device)
            q = h @ t["W_enc"]
            if self._normalization != "none":
                q = q / token_divisor(h, self._normalization)
            q = q + t["b_enc"]
            if self._linear:
                return q
            return torch.relu(q) * (q > t["threshold"]) if "threshold" in t else torch.relu(q)
        sae = self._sae = self._sae.to(h.device, torch.float32)
        step = max(1, _ENCODE_NUMBERS // sae.spec.d_sae)
        parts = [self._encoded(sae, piece) for piece in torch.split(h, step)]
        return torch.cat(parts) if parts else h.new_zeros((0, len(self._ids)))

    def _encoded(self, sae: SAE, h: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens n"]:
        """The latents of `sae.encode`, without its dense result where that can be avoided."""
        if sae.spec.architecture != "topk" or h.device.type != "cpu" or not len(h):
            return sae.encode(h)[:, self._ids]
        assert sae.spec.k is not None
        q = sae.pre_acts(h)
        largest = q.topk(sae.spec.k, dim=-1).values
        last, own = largest[:, -1:], q[:, self._ids]
        # Among equal values the SAE keeps the lowest index, and it never keeps NaN. Both cases are
        # rare and left to the SAE itself.
        tied = (own == last) & (own > 0)
        if bool(largest[:, 0].isnan().any()) or (
            bool(tied.any()) and bool(((q >= last).sum(dim=-1) > sae.spec.k).any())
        ):
            return sae.encode(h)[:, self._ids]
        return torch.relu(own) * (own >= last)


def on_device(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors on a device, moved at the first use there."""
    if all(tensor.device == device for tensor in tensors.values()):
        return tensors
    # No inference tensors: the same plan may be used later where gradients are taken.
    with torch.inference_mode(False):
        return {name: tensor.to(device) for name, tensor in tensors.items()}


def needs_sae(part: PlanPart) -> bool:
    """Whether running the part needs its SAE."""
    return (part.does.reads_latents and _edit_columns(part) is None) or (
        part.gate != "" and _gate_columns(part) is None
    )


def readable(part: PlanPart) -> bool:
    """Whether the part's own latents can be read without its SAE."""
    return _edit_columns(part) is not None


def with_gate(plan: Plan, gate: str, sae: SAE | None = None, *, part: int | None = None) -> Plan:
    """The plan with another gate ("" for none), in part number `part` if it has several.

    The encoder columns of the gate's latents are copied out of `sae`, so that the plan no longer
    needs the SAE for its gate (topk SAEs are always needed). Raises UsageError for a gate that
    cannot be parsed, or reads a latent that `sae` does not have.
    """
    if part is None:
        part = plan.parts.index(plan.part)
    ids = parse_gate(gate).ids if gate else ()
    if sae is not None and ids and max(ids) >= sae.spec.d_sae:
        raise UsageError(
            f"`gate` reads latent {max(ids)}, and the SAE {sae.source} has latents "
            f"0..{sae.spec.d_sae - 1}: choose one of those"
        )
    columns = {} if sae is None or not ids else encoder_columns(sae, ids)
    return plan.with_changes(
        part=part,
        gate=gate,
        gate_ids=ids if columns else (),
        gate_W_enc=columns.get("W_enc"),
        gate_b_enc=columns.get("b_enc"),
        gate_threshold=columns.get("threshold"),
    )


def _edit_columns(part: PlanPart) -> dict[str, Tensor] | None:
    """The encoder columns of the part's latents; None where they are not enough to read them."""
    return _complete(part, part.W_enc, part.b_enc, part.threshold)


def _gate_columns(part: PlanPart) -> dict[str, Tensor] | None:
    """The encoder columns of the gate's latents: the gate's own, or among those of the part."""
    if part.gate_ids:
        return _complete(part, part.gate_W_enc, part.gate_b_enc, part.gate_threshold)
    own = _edit_columns(part)
    ids = part.parsed_gate.ids
    if own is None or not set(ids) <= set(part.ids):
        return None
    places = [part.ids.index(i) for i in ids]
    return {name: tensor[..., places] for name, tensor in own.items()}


def _complete(
    part: PlanPart, W_enc: Tensor | None, b_enc: Tensor | None, threshold: Tensor | None
) -> dict[str, Tensor] | None:
    if part.sae.architecture == "topk" or W_enc is None or b_enc is None:
        return None
    if threshold is None:
        jumps = part.sae.architecture == "jumprelu"
        return None if jumps else {"W_enc": W_enc, "b_enc": b_enc}
    return {"W_enc": W_enc, "b_enc": b_enc, "threshold": threshold}


def edit_reader(part: PlanPart, sae: SAE | None) -> LatentReader:
    """A reader of the part's own latents, by the SAE if given, else by the part's own columns."""
    return _reader(part, part.ids, _edit_columns(part), sae)


def gate_reader(part: PlanPart, sae: SAE | None) -> LatentReader:
    """A reader of the latents of the part's gate, likewise."""
    return _reader(part, part.parsed_gate.ids, _gate_columns(part), sae)


def _reader(
    part: PlanPart, ids: tuple[int, ...], columns: dict[str, Tensor] | None, sae: SAE | None
) -> LatentReader:
    if sae is not None:
        if not is_plain(sae):
            raise UserError(
                f"`sae` {sae.source} reads elsewhere than it writes, so its latents have no values "
                "where it steers: leave out `gate` and `explain`"
            )
        columns = encoder_columns(sae, ids)
        return LatentReader(
            ids,
            columns,
            None if columns else sae,
            normalization=sae.spec.normalize_activations if sae.spec.scales_tokens else "none",
        )
    assert columns is not None, "call matching_sae before"
    linear = part.sae.architecture == "linear"
    return LatentReader(ids, columns, None, linear, part.sae.normalize_activations)


SAEs = SAE | Sequence[SAE] | None
"""One SAE for all parts, or several, of which each part uses its own."""


def given_sae(part: PlanPart, saes: SAEs) -> SAE | None:
    """The given SAE that the part should use; of several, the one with the part's SHA-256."""
    if saes is None or isinstance(saes, SAE):
        return saes
    return next((sae for sae in saes if sae.sha256 == part.sae.sha256), None)


def matching_sae(part: PlanPart, sae: SAE | None, force: bool) -> SAE:
    """The SAE that the part was made from: `sae` if given, else loaded from the part's source.

    Raises UserError when it cannot be opened, has other weights (unless `force`), or has another
    width or too few latents.
    """
    reason = f"`method` {part.method}" if part.does.reads_latents else "`gate`"
    if sae is None:
        try:
            sae = load_sae(part.sae.source)
        except UserError as error:
            what = "a TopK SAE" if part.sae.architecture == "topk" else "this plan"
            raise UserError(
                f"{reason} with {what} needs the SAE itself, and the plan's "
                f"could not be opened ({error}): give `sae`"
            ) from error
    if sae.sha256 != part.sae.sha256 and not force:
        raise UserError(
            f"`sae` {sae.source} is not the one the plan was made from ({part.sae.source}): its "
            "weights differ; give that SAE (of several, a list), or `force`"
        )
    gated = part.parsed_gate.ids if part.gate else ()
    for number, whose in [(i, "`gate`") for i in gated] + [(i, "the plan") for i in part.ids]:
        if number >= sae.spec.d_sae:
            raise UserError(
                f"{whose} names latent {number}, and `sae` {sae.source} has the latents "
                f"0..{sae.spec.d_sae - 1}: choose one of these"
            )
    if is_plain(sae) and sae.spec.d_model != part.directions.shape[1]:
        raise UserError(
            f"`sae` {sae.source} has d_model {sae.spec.d_model} and the plan is for "
            f"{part.directions.shape[1]}: give {part.sae.source}"
        )
    return sae
