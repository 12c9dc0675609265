"""Plans for latents of an SAE, with everything needed to steer copied out of the SAE."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_file import SAE
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.model.sae_places import is_plain, steered
from saesteer.steering.plans.methods import METHODS
from saesteer.steering.plans.plan import (
    ModelIdentity,
    Plan,
    PlannedLatent,
    PlanPart,
    SAEIdentity,
    TaskIdentity,
)


def make_plan(
    lm: LanguageModel,
    sae: SAE,
    latents: Sequence[PlannedLatent],
    *,
    layer: int | None = None,
    site: str | None = None,
    method: str = "add",
    unit: str = "raw",
    scale: float = 1.0,
    beta: float = 0.0,
    scope: str = "generation",
    schedule: str = "constant",
    task: TaskIdentity | None = None,
    metrics: Mapping[str, Any] | None = None,
) -> Plan:
    """A plan for latents of an SAE; the directions and encoder columns are copied out of it.

    `layer` and `site` are needed only where the SAE does not say what it reads (negative layers
    count from the end), and for a crosscoder, which steers at one of its places. A transcoder
    steers where it writes.

    Raises:
        UsageError: a latent that the SAE does not have, a layer or site that contradicts it, a
            method that depends on the present values of latents which are read elsewhere.
        UserError: an SAE for another width or for a deeper model.
    """
    # force: the caller checks whether the SAE was trained on these weights.
    point, view = steered(sae, lm, layer=layer, site=site, force=True)
    return Plan(
        model=ModelIdentity(lm.name, lm.fingerprint, lm.n_layers, lm.d_model),
        parts=(
            _part(
                sae,
                latents,
                view,
                site=point.site,
                layer=point.layer,
                method=method,
                unit=unit,
                scale=scale,
                beta=beta,
                scope=scope,
                schedule=schedule,
            ),
        ),
        task=task,
        metrics=dict(metrics or {}),
    )


def _part(
    sae: SAE, latents: Sequence[PlannedLatent], view: SAE | None = None, **settings: Any
) -> PlanPart:
    """The part of a plan that these latents make, with what steering needs copied out of the SAE.

    `view` is the SAE with the decoder of the place that is steered, see `steered`; `settings` are
    fields of the part. Raises what `make_plan` does.
    """
    method = settings.get("method", "add")
    if not is_plain(sae) and method in METHODS and METHODS[method].reads_latents:
        adding = ", ".join(name for name, one in METHODS.items() if not one.reads_latents)
        raise UsageError(
            f"`method` {method} depends on the values of latents, which `sae` {sae.source} reads "
            f"elsewhere than it writes: use one of {adding}"
        )
    if sae.spec.centers_input and sae.spec.normalize_activations == "constant_norm_rescale":
        raise UserError(
            f"`sae` {sae.source} scales each token by its length without its mean, which a plan "
            "cannot express: choose another SAE"
        )
    for latent in latents:
        if not 0 <= latent.id < sae.spec.d_sae:
            raise UsageError(
                f"latent {latent.id} is out of range: the SAE {sae.source} has "
                f"{sae.spec.d_sae} latents, 0..{sae.spec.d_sae - 1}"
            )
    ids = [latent.id for latent in latents]
    columns = encoder_columns(sae, ids)
    return PlanPart(
        sae=SAEIdentity(
            _absolute_if_local(sae.source),
            sae.sha256,
            sae.spec.architecture,
            sae.spec.k,
            sae.spec.normalize_activations if sae.spec.scales_tokens else "none",
        ),
        latents=tuple(latents),
        directions=(view or sae).W_dec[ids].detach().cpu().clone(),
        W_enc=columns.get("W_enc"),
        b_enc=columns.get("b_enc"),
        threshold=columns.get("threshold"),
        **settings,
    )


def _absolute_if_local(source: str) -> str:
    """The absolute path of a local folder, so that the plan finds it from any working directory."""
    folder = Path(source).expanduser()
    return str(folder.absolute()) if source and folder.is_dir() else source


def plan_from_latents(
    lm: LanguageModel,
    sae: SAE,
    layer: int | None,
    values: Mapping[int, float | None],
    *,
    site: str | None = None,
    method: str = "add",
    unit: str = "raw",
    scale: float = 1.0,
    beta: float = 0.0,
    scope: str = "generation",
    schedule: str = "constant",
) -> Plan:
    """A plan for latents chosen by number, with the values given for them.

    `values` maps latents to values (None for methods without a dose); the other arguments are those
    of `make_plan`. Raises what `make_plan` raises, and UsageError for a missing value or a `beta`
    that is not 0.
    """
    return make_plan(
        lm,
        sae,
        _with_values(values, method),
        layer=layer,
        site=site,
        method=method,
        unit=unit,
        scale=scale,
        beta=beta,
        scope=scope,
        schedule=schedule,
    )


def check_values(sae: SAE, values: Mapping[int, float | None], **settings: Any) -> None:
    """What `plan_from_latents` refuses, as far as it can be told without the model.

    `settings` are its keyword arguments but for `site`. Raises UsageError.
    """
    latents = _with_values(values, settings.get("method", "add"))
    _part(sae, latents, site="resid_post", layer=0, **settings)


def _with_values(values: Mapping[int, float | None], method: str) -> list[PlannedLatent]:
    if not values:
        raise UsageError("`latents` is empty: give ID:VALUE,... such as 9143:1.2,412:0.8")
    missing = [i for i, value in values.items() if value is None]
    if missing and method in METHODS and METHODS[method].takes_dose:
        raise UsageError(
            f"`latents` {missing[0]} has no value and `method` {method} needs one: write "
            f"{missing[0]}:VALUE"
        )
    return [PlannedLatent(id=i, value=value) for i, value in values.items()]


def parse_latents(text: str) -> dict[int, float | None]:
    """Parse the text of `--latents`: `9143:1.2,412:0.8`, or `9143,412` for methods without a dose.

    Raises UsageError for anything else.
    """
    values: dict[int, float | None] = {}
    for part in (piece.strip() for piece in text.split(",")):
        number, colon, value = part.partition(":")
        try:
            if not re.fullmatch(r"\d+", number.strip()):
                raise ValueError
            latent, chosen = int(number), float(value) if colon else None
        except ValueError:
            raise UsageError(
                f"`latents` must be ID:VALUE,ID:VALUE (such as 9143:1.2,412:0.8) or ID,ID for "
                f"ablate and project, got {part!r} in {text!r}"
            ) from None
        if latent in values:
            raise UsageError(f"`latents` names latent {latent} twice: name each latent once")
        values[latent] = chosen
    return values


def encoder_columns(sae: SAE, ids: Sequence[int]) -> dict[str, Tensor]:
    """The encoder of some latents in float32: W_enc `[d_model, n]`, b_enc `[n]`, threshold `[n]`.

    Subtractions from the input are folded in: (x - b_dec) W + b = x W + (b - b_dec W), and likewise
    a token's own mean, which is linear in x. Empty where a latent's value depends on more than its
    column: on all other latents (topk), on a gate, or on activations of another place. Where the
    SAE normalises tokens, x W has to be divided by `token_divisor` before the bias is added.
    """
    if not sae.spec.reads_alone or not is_plain(sae):
        return {}
    picked = list(ids)
    columns = sae.W_enc[:, picked].detach().cpu().float()
    bias = sae.b_enc[picked].detach().cpu().float()
    if sae.spec.apply_b_dec_to_input:
        bias = bias - sae.b_dec.detach().cpu().float() @ columns
    if sae.spec.centers_input or sae.spec.normalize_activations == "layer_norm":
        columns = columns - columns.mean(dim=0, keepdim=True)
    tensors = {"W_enc": columns.contiguous(), "b_enc": bias}
    if sae.threshold is not None:
        tensors["threshold"] = sae.threshold[picked].detach().cpu().float()
    return tensors
