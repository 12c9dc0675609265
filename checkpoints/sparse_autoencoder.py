"""An SAE's weights, and the general equation that covers the SAEs of all formats.

With `n_i` the norm of row i of `W_dec`:

    s     = norm_in(x) - input_bias * b_dec
    q     = s W_enc + b_enc               (times n with `rescale_acts_by_decoder_norm`)
    f     = act(q)
    x_hat = norm_out(f W_dec + b_dec)     (f divided by n with `rescale_acts_by_decoder_norm`)
            + x W_skip^T                  (where there is a skip connection)

The code here is the slow reference: dense, in plain PyTorch, for any device and float dtype.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.sae_spec import DTYPES, SAESpec
from saesteer.checkpoints.shown import Shown

# SAELens and OpenAI's code both add this to the standard deviation, not to the variance.
_LAYER_NORM_EPS = 1e-5

_log = logging.getLogger(__name__)


@dataclass(repr=False)
class SAE(Shown):
    """An SAE's weights and what they compute.

    Weights of a SAELens file are exactly the file's: nothing is folded or normalised on load. What
    the reader of another format folded is listed in `notes`.
    """

    spec: SAESpec
    W_enc: Float[Tensor, "d_model d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    """For gated SAEs the bias of the gate."""
    W_dec: Float[Tensor, "d_sae d_out"]
    b_dec: Float[Tensor, " d_out"]
    threshold: Float[Tensor, " d_sae"] | None = None
    """JumpReLU only: a latent is active when its pre-activation is greater than this value."""
    source: str = ""
    """The folder or RELEASE:ID it came from."""
    sha256: str = ""
    """Of the weights file; of the tensors for a RELEASE:ID."""
    b_mag: Float[Tensor, " d_sae"] | None = None
    """Gated only: bias of the magnitude."""
    r_mag: Float[Tensor, " d_sae"] | None = None
    """Gated only: logarithm of what the magnitude path multiplies W_enc by."""
    W_skip: Float[Tensor, "d_out d_model"] | None = None
    """Adds x W_skip^T to the output."""
    format: str = ""
    """The format it was read from; a key of `saesteer.checkpoints.formats.READERS`."""
    notes: tuple[str, ...] = ()
    """What the reader folded, assumed or left out, one sentence each."""

    def _facts(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "architecture": spec.architecture,
            "d_model": spec.d_model,
            "d_sae": spec.d_sae,
            "k": spec.k,
            "layer": spec.layer,
            "site": spec.site,
            "model": spec.model_name,
            "dtype": str(self.W_enc.dtype).removeprefix("torch."),
            "device": str(self.W_enc.device),
            "source": self.source,
        }

    def pre_acts(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """The values that the activation function chooses from (q above), in the SAE's dtype."""
        q = self._read(x) @ self.W_enc + self.b_enc
        return q * self.row_norms() if self.spec.rescale_acts_by_decoder_norm else q

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """Latent activations, dense, in the SAE's dtype.

        topk keeps the k largest pre-activations, then applies ReLU, so fewer than k may be
        positive; among equals the lowest index wins; NaN is never chosen. abstopk keeps the k
        largest magnitudes with their signs. groupmax applies ReLU and keeps the maximum of each of
        k contiguous groups. gated is 1[u + b_gate > 0] * relu(u * exp(r_mag) + b_mag) with
        u = s W_enc. matching_pursuit takes the latent of the largest product with what is left of
        s, adds the product to that latent, subtracts its contribution from what is left, and
        repeats; `SAESpec` says when it ends.
        """
        if self.spec.architecture == "matching_pursuit":
            s = self._read(x)
            acts = _pursue(s.reshape(-1, s.shape[-1]), self.W_dec, self.spec)
            return acts.reshape(*s.shape[:-1], self.spec.d_sae)
        if self.spec.architecture == "gated":
            assert self.b_mag is not None and self.r_mag is not None
            u = self._read(x) @ self.W_enc
            magnitude = torch.relu(u * self.r_mag.exp() + self.b_mag)
            return magnitude * (u + self.b_enc > 0)
        q = self.pre_acts(x)
        match self.spec.architecture:
            case "topk":
                assert self.spec.k is not None
                return torch.where(_largest(q, self.spec.k), torch.relu(q), torch.zeros_like(q))
            case "abstopk":
                assert self.spec.k is not None
                return torch.where(_largest(q.abs(), self.spec.k), q, torch.zeros_like(q))
            case "groupmax":
                assert self.spec.k is not None
                groups = torch.relu(q).unflatten(-1, (self.spec.k, -1))
                kept = torch.where(_largest(groups, 1), groups, torch.zeros_like(groups))
                return kept.flatten(-2)
            case "jumprelu":
                assert self.threshold is not None
                return torch.relu(q) * (q > self.threshold)
        return torch.relu(q)

    def decode(
        self,
        latent_acts: Float[Tensor, "*batch d_sae"],
        x: Float[Tensor, "*batch d_model"] | None = None,
    ) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction of latent activations, in the SAE's dtype.

        `x`, the activations they were encoded from, is needed where the output depends on them
        besides the latents: token-wise normalisation and skip connections. Raises ValueError when
        it is missing there.
        """
        _check_width("latent_acts", latent_acts, "d_sae", self.spec.d_sae)
        acts = latent_acts.to(self.W_dec.dtype)
        if self.spec.rescale_acts_by_decoder_norm:
            acts = acts / self.row_norms()
        out = acts @ self.W_dec + self.b_dec
        # As in SAELens: a transcoder's output is not scaled back, because its site is another one.
        unscaled = self.spec.scales_tokens and not self.spec.is_transcoder
        if x is None:
            if unscaled or self.W_skip is not None:
                raise ValueError("this SAE's output depends on its input too: decode(latents, x)")
            return out
        x = x.to(self.W_dec.dtype)
        if unscaled:
            out = out * self.token_scale(x)
            if self.spec.normalize_activations == "layer_norm":
                out = out + x.mean(dim=-1, keepdim=True)
        return out if self.W_skip is None else out + x @ self.W_skip.T

    def reconstruct(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_out"]:
        """Encode and decode."""
        return self.decode(self.encode(x), x)

    def token_scale(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch 1"]:
        """The factor on each token's decoded latents; 1 without token-wise normalisation.

        See the function `token_scale`.
        """
        return token_scale(x, self.spec.normalize_activations)

    def row_norms(self) -> Float[Tensor, " d_sae"]:
        """The norms of the decoder's rows, clamped to at least 1e-8."""
        norms: Tensor = torch.linalg.vector_norm(self.W_dec, dim=-1)
        return norms.clamp(min=1e-8)

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | str | None = None
    ) -> "SAE":
        """A copy on another device or in another float dtype (shared memory if neither changes)."""
        kind = self.W_enc.dtype if dtype is None else _dtype(dtype)
        changes: dict[str, Any] = {
            name: tensor.to(device=device, dtype=kind) for name, tensor in self.tensors().items()
        }
        changes["spec"] = dataclasses.replace(self.spec, dtype=_dtype_name(kind))
        return dataclasses.replace(self, **changes)

    def tensors(self) -> dict[str, Tensor]:
        """The weights that the SAE has, by the names of their fields."""
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "b_mag", "r_mag", "W_skip")
        fields = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}

    def check(self, what: str) -> "SAE":
        """Check names, shapes and values against the spec; `what` begins the error. Returns self.

        Raises a `UserError` for the first that does not fit.
        """
        check_tensors(self.tensors(), self.spec, what)
        return self

    def _read(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """s of the equation above."""
        _check_width("x", x, "d_model", len(self.W_enc))
        x = x.to(self.W_enc.dtype)
        if self.spec.centers_input:
            x = x - x.mean(dim=-1, keepdim=True)
        kind = self.spec.normalize_activations
        if self.spec.scales_tokens:
            centered = x - x.mean(dim=-1, keepdim=True) if kind == "layer_norm" else x
            x = centered / token_divisor(x, kind)
        return x - self.b_dec if self.spec.apply_b_dec_to_input else x


def _check_width(argument: str, given: Tensor, name: str, width: int) -> None:
    """Raise ValueError where the last axis has another length than the SAE's."""
    if given.ndim == 0 or given.shape[-1] != width:
        raise ValueError(
            f"`{argument}` must end in an axis of {width} ({name} of this SAE), got the shape "
            f"{list(given.shape)}: is it of another model or layer?"
        )


def _pursue(
    rest: Float[Tensor, "rows d_model"], W_dec: Float[Tensor, "d_sae d_model"], spec: SAESpec
) -> Float[Tensor, "rows d_sae"]:
    """Matching pursuit on rows `rest`; `SAE.encode` says how."""
    acts = rest.new_zeros(len(rest), len(W_dec))
    finished = torch.zeros(len(rest), dtype=torch.bool, device=rest.device)
    chosen = torch.zeros_like(acts, dtype=torch.bool)
    for _ in range(spec.max_iterations or spec.d_model):
        best = torch.relu(rest @ W_dec.T).argmax(dim=1)
        rows = W_dec[best]
        amount = torch.relu((rest * rows).sum(dim=1)).masked_fill(finished, 0)
        acts.scatter_add_(1, best[:, None], amount[:, None])
        rest = rest - amount[:, None] * rows
        if spec.stop_on_duplicate_support:
            support = acts != 0
            finished = finished | (support == chosen).all(dim=1)
            chosen = support
        if spec.residual_threshold > 0:
            finished = finished | (rest.norm(dim=1) < spec.residual_threshold)
        if bool(finished.all()):
            break
    return acts


def token_scale(x: Float[Tensor, "*batch d_model"], kind: str) -> Float[Tensor, "*batch 1"]:
    """The factor by which a normalisation multiplies each token's decoded latents; 1 for most.

    layer_norm: the standard deviation over d_model; constant_norm_rescale: ||x|| / sqrt(D).
    """
    if kind == "layer_norm":
        std: Tensor = x.std(dim=-1, keepdim=True)
        return std
    if kind == "constant_norm_rescale":
        mean_square: Tensor = x.square().mean(dim=-1, keepdim=True)
        return mean_square.sqrt()
    return torch.ones_like(x[..., :1])


def token_divisor(x: Float[Tensor, "*batch d_model"], kind: str) -> Float[Tensor, "*batch 1"]:
    """What a normalisation divides each token's input by, after layer_norm's centering."""
    scale = token_scale(x, kind)
    if kind == "layer_norm":
        return scale + _LAYER_NORM_EPS
    # A row of zeros has no direction: it stays zeros instead of becoming NaN.
    return scale.clamp(min=torch.finfo(x.dtype).tiny)


def check_tensors(tensors: Mapping[str, Tensor], spec: SAESpec, what: str) -> None:
    """Check names, shapes and values against a spec; `what` begins the error.

    Raises UserError for the first that does not fit.
    """
    width = spec.d_model if spec.d_out is None else spec.d_out
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (spec.d_model, spec.d_sae),
        "b_enc": (spec.d_sae,),
        "W_dec": (spec.d_sae, width),
        "b_dec": (width,),
    }
    if spec.architecture == "jumprelu":
        shapes["threshold"] = (spec.d_sae,)
    if spec.architecture == "gated":
        shapes |= {"b_mag": (spec.d_sae,), "r_mag": (spec.d_sae,)}
    if "W_skip" in tensors:
        shapes["W_skip"] = (width, spec.d_model)
    missing, extra = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or extra:
        raise UserError(
            f"{what}: a {spec.architecture} SAE needs the tensors {', '.join(shapes)}; "
            f"missing: {', '.join(missing) or 'none'}; unexpected: {', '.join(extra) or 'none'}"
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise UserError(
                f"{what}: {name} has shape {list(tensors[name].shape)}, but d_in {spec.d_model} "
                f"and d_sae {spec.d_sae} need {list(shape)}; the config and the weights do not "
                "belong together"
            )
        if not bool(torch.isfinite(tensors[name]).all()):
            raise UserError(f"{what}: {name} holds NaN or infinity; make or download the SAE again")
    if spec.architecture == "matching_pursuit":
        bare = spec.apply_b_dec_to_input or not bool(tensors["b_dec"].any())
        tied = torch.equal(tensors["W_enc"], tensors["W_dec"].T)
        if not (tied and bare) or bool(tensors["b_enc"].any()):
            raise UserError(
                f"{what}: a matching_pursuit SAE reads by its decoder's rows: W_enc must be the "
                "transpose of W_dec, b_enc 0, and b_dec 0 unless it is subtracted from the input"
            )
    if spec.architecture == "jumprelu" and bool((tensors["threshold"] < 0).any()):
        _log.warning("%s: some thresholds are negative, which act like 0", what)


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, for SAEs that are not one file."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _largest(q: Float[Tensor, "*batch n"], k: int) -> Tensor:
    """Which entries of each row are among its k largest; among equals the lowest index."""
    ranked = torch.nan_to_num(q, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    last = ranked.topk(k, dim=-1).values[..., -1:]
    above, tied = ranked > last, ranked == last
    room = k - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= room))


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        _dtype_name(dtype)
        return dtype
    if dtype not in DTYPES:
        raise UsageError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def _dtype_name(dtype: torch.dtype) -> str:
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise UsageError(f"`dtype` must be one of {', '.join(DTYPES)}, got {dtype}")
