"""SAEs on disk in the SAELens >= 6 layout, and the encode/decode equation they mean.

A folder holds `cfg.json` and `sae_weights.safetensors`. With `n_i` the norm of row i of `W_dec`:

    s     = x - input_bias * b_dec
    q     = s W_enc + b_enc               (times n with `rescale_acts_by_decoder_norm`)
    f     = relu(q) | relu(q) where q > threshold | relu of the k largest q
    x_hat = f W_dec + b_dec               (f divided by n with `rescale_acts_by_decoder_norm`)

The code here is the slow reference: dense, plain PyTorch, any device and float dtype.
"""

import dataclasses
import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata as installed
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints import files
from saesteer.checkpoints.errors import UsageError, UserError

Architecture = Literal["topk", "standard", "jumprelu"]
ARCHITECTURES: tuple[str, ...] = get_args(Architecture)

# "expected_average_only_in" scales activations in training only: at inference SAELens does nothing
# with it, and neither do we. The other modes change each token and are not built yet.
NORMALIZATIONS = ("none", "expected_average_only_in")

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

_CFG = "cfg.json"
_WEIGHTS = "sae_weights.safetensors"

_SITE_HOOKS = {
    "resid_post": "hook_resid_post",
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
}
_HOOK_SITES = {hook: site for site, hook in _SITE_HOOKS.items()}
_BLOCK_PATH = re.compile(r"(?:.*\.)?(?:layers|h|blocks|block|layer)\.(\d+)")

_log = logging.getLogger(__name__)


def hook_name_for(layer: int, site: str) -> str:
    """The TransformerLens name of a site: (12, "resid_post") gives "blocks.12.hook_resid_post".

    A site that is a module path is its own name.
    """
    return f"blocks.{layer}.{_SITE_HOOKS[site]}" if site in _SITE_HOOKS else site


def parse_hook_name(hook_name: str | None) -> tuple[int | None, str | None]:
    """Layer and site that a hook name means; None for what it does not say.

    Understands TransformerLens names ("blocks.12.hook_resid_post") and the module path of a block
    ("model.layers.12", whose output is resid_post). Any other module path is returned as the site.
    """
    if not hook_name:
        return None, None
    found = re.fullmatch(r"blocks\.(\d+)\.(hook_\w+)", hook_name)
    if found and found.group(2) in _HOOK_SITES:
        return int(found.group(1)), _HOOK_SITES[found.group(2)]
    if block := _BLOCK_PATH.fullmatch(hook_name):
        return int(block.group(1)), "resid_post"
    number = re.search(r"\.(\d+)(?:\.|$)", hook_name)
    return (int(number.group(1)) if number else None), (None if "hook_" in hook_name else hook_name)


@dataclass(frozen=True, kw_only=True)
class SAESpec:
    """What an SAE computes and where it reads, without its weights."""

    architecture: Architecture
    """Which activation: "topk", "standard" (ReLU) or "jumprelu"."""
    d_model: int
    """Width of the activations it reads."""
    d_sae: int
    """Number of latents."""
    k: int | None = None
    """Latents kept per token; for topk only."""
    apply_b_dec_to_input: bool = False
    """Whether b_dec is subtracted from the input."""
    normalize_activations: str = "none"
    """One of `NORMALIZATIONS`; both mean nothing at inference."""
    rescale_acts_by_decoder_norm: bool = False
    """For topk only: whether latents are chosen, and given, in units of their decoder row."""
    dtype: str = "float32"
    """dtype of the weights: "float32", "bfloat16", "float16" or "float64"."""
    hook_name: str = ""
    """TransformerLens name of the site, "blocks.12.hook_resid_post"; empty when unknown."""
    hf_hook_name: str = ""
    """Module path in the Hugging Face model, "model.layers.12"; empty when unknown."""
    model_name: str = ""
    """The language model it was trained on; empty when unknown."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Everything else under `metadata` in cfg.json; our own facts are in `metadata["saesteer"]`."""

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise UsageError(
                f"architecture must be one of {', '.join(ARCHITECTURES)}, got {self.architecture!r}"
            )
        if self.d_model < 1 or self.d_sae < 1:
            raise UsageError(
                f"d_model and d_sae must be positive, got {self.d_model} and {self.d_sae}"
            )
        if self.architecture == "topk" and not (self.k and 0 < self.k <= self.d_sae):
            raise UsageError(f"k must be in 1..{self.d_sae} (d_sae), got {self.k}")
        if self.architecture != "topk" and self.rescale_acts_by_decoder_norm:
            raise UsageError("rescale_acts_by_decoder_norm is for topk only; leave it out")
        if self.normalize_activations not in NORMALIZATIONS:
            raise UsageError(
                f"normalize_activations must be one of {', '.join(NORMALIZATIONS)}, "
                f"got {self.normalize_activations!r}"
            )
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    @property
    def layer(self) -> int | None:
        """0-based block that it reads, from the hook name; None when the name does not say."""
        return self._place[0]

    @property
    def site(self) -> str | None:
        """What it reads: "resid_post" and so on, or a module path; None when no name says."""
        return self._place[1]

    @property
    def centers_input(self) -> bool:
        """Whether it was trained on activations without their mean over d_model.

        True for SAEs made with TransformerLens models whose writing weights were centered, such as
        `gpt2-small-res-jb`: `pre_acts` subtracts each token's mean, and the reconstruction is of
        the centered activation.
        """
        kwargs = self.metadata.get("model_from_pretrained_kwargs")
        return isinstance(kwargs, dict) and kwargs.get("center_writing_weights") is True

    @property
    def _place(self) -> tuple[int | None, str | None]:
        layer, site = parse_hook_name(self.hook_name)
        if layer is None or site is None:
            hf_layer, hf_site = parse_hook_name(self.hf_hook_name)
            layer, site = (hf_layer if layer is None else layer), site or hf_site
        return layer, site


@dataclass
class SAE:
    """An SAE's weights with the equation that gives them a meaning.

    Weights are exactly the file's: nothing is folded or normalised on load.
    """

    spec: SAESpec
    W_enc: Float[Tensor, "d_model d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_model"]
    b_dec: Float[Tensor, " d_model"]
    threshold: Float[Tensor, " d_sae"] | None = None
    """JumpReLU only: a latent counts when its pre-activation is above (not at) this value."""
    source: str = ""
    """The folder or RELEASE:ID it came from."""
    sha256: str = ""
    """Of the weights file; of the tensors for a RELEASE:ID."""

    def pre_acts(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """The values that the activation function chooses from (q above), in the SAE's dtype."""
        x = x.to(self.W_enc.dtype)
        if self.spec.centers_input:
            x = x - x.mean(dim=-1, keepdim=True)
        if self.spec.apply_b_dec_to_input:
            x = x - self.b_dec
        q = x @ self.W_enc + self.b_enc
        return q * self._row_norms() if self.spec.rescale_acts_by_decoder_norm else q

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """Latent activations, dense, in the SAE's dtype.

        topk keeps the k largest pre-activations, then applies ReLU, so fewer than k may be
        positive; among equals the lowest index wins; NaN is never chosen.
        """
        q = self.pre_acts(x)
        if self.spec.architecture == "topk":
            assert self.spec.k is not None
            return _keep_top_k(q, self.spec.k)
        if self.spec.architecture == "jumprelu":
            assert self.threshold is not None
            return torch.relu(q) * (q > self.threshold)
        return torch.relu(q)

    def decode(self, latent_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_model"]:
        """The reconstruction of latent activations, in the SAE's dtype."""
        acts = latent_acts.to(self.W_dec.dtype)
        if self.spec.rescale_acts_by_decoder_norm:
            acts = acts / self._row_norms()
        return acts @ self.W_dec + self.b_dec

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
        """The weights by their names in the file."""
        tensors = {
            "W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec
        }  # fmt: skip
        return tensors if self.threshold is None else {**tensors, "threshold": self.threshold}

    def save(self, folder: str | Path) -> str:
        """Write it as `save_sae` does; returns the SHA-256 of the weights file."""
        return save_sae(folder, self.spec, **self.tensors())

    def _row_norms(self) -> Float[Tensor, " d_sae"]:
        norms: Tensor = torch.linalg.vector_norm(self.W_dec, dim=-1)
        return norms.clamp(min=1e-8)


def save_sae(
    folder: str | Path,
    spec: SAESpec,
    W_enc: Float[Tensor, "d_model d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_model"],
    b_dec: Float[Tensor, " d_model"],
    threshold: Float[Tensor, " d_sae"] | None = None,
) -> str:
    """Write an SAE that `sae_lens.SAE.load_from_disk` opens; returns the weights file's SHA-256.

    Tensors are written in `spec.dtype`. `spec.metadata` goes into cfg.json's `metadata` beside the
    names in the spec; SAELens' own activation store also wants `context_size` and `prepend_bos`
    there. The folder is made if missing; each of the two files appears whole or not at all.

    Raises:
        UserError: shapes that do not fit the spec, values that are not finite, a full disk.
    """
    folder = Path(folder)
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    if threshold is not None:
        tensors["threshold"] = threshold
    tensors = {name: tensor.detach().to(DTYPES[spec.dtype]) for name, tensor in tensors.items()}
    _check_tensors(tensors, spec, f"the SAE for {folder}")
    config: dict[str, Any] = {
        "architecture": spec.architecture,
        "d_in": spec.d_model,
        "d_sae": spec.d_sae,
        "dtype": spec.dtype,
        "device": "cpu",
        "apply_b_dec_to_input": spec.apply_b_dec_to_input,
        "normalize_activations": spec.normalize_activations,
        "reshape_activations": "none",
    }
    if spec.architecture == "topk":
        config["k"] = spec.k
        config["rescale_acts_by_decoder_norm"] = spec.rescale_acts_by_decoder_norm
    config["metadata"] = {
        "hook_head_index": None,
        **spec.metadata,
        # Without this key SAELens reads the file as one from before version 6.
        "sae_lens_version": installed.version("sae-lens"),
        "model_name": spec.model_name,
        "hook_name": spec.hook_name,
        "hf_hook_name": spec.hf_hook_name,
    }
    folder.mkdir(parents=True, exist_ok=True)
    files.write_tensors(folder / _WEIGHTS, tensors)
    files.write_json(folder / _CFG, config)
    return files.sha256_file(folder / _WEIGHTS)


def load_sae(
    path_or_release: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
) -> SAE:
    """Open an SAE: a folder in SAELens >= 6 format, or `RELEASE:ID` from SAELens' list on the Hub.

    `dtype` None keeps the dtype that cfg.json states.

    Raises:
        UserError: nothing there, a file missing or cut short, shapes or values that cannot be, an
            architecture or normalisation we do not compute, a release that cannot be fetched.
    """
    text = str(path_or_release)
    folder = Path(text).expanduser()
    if folder.is_dir():
        sae = _load_folder(folder, text)
    elif not folder.exists() and re.fullmatch(r"[\w./-]+:.+", text) and text[0] not in "./":
        sae = _load_release(text)
    else:
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(
            f"--sae {text} {what}: give a folder with {_CFG} and {_WEIGHTS}, or RELEASE:ID of "
            "sae_lens"
        )
    return sae.to(device, dtype)


def _load_folder(folder: Path, source: str) -> SAE:
    missing = [name for name in (_CFG, _WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"--sae {source} holds no {' and no '.join(missing)}: give a folder in SAELens format "
            f"({_CFG} and {_WEIGHTS})"
        )
    config = files.read_json(folder / _CFG)
    if not isinstance(config, dict):
        raise UserError(f"--sae {source}: {_CFG} is not a JSON object; restore the file")
    metadata = config.get("metadata")
    inner = metadata.get("sae_lens_version") if isinstance(metadata, dict) else None
    version = config.get("sae_lens_version") or inner
    major = str(version).split(".")[0]
    if not isinstance(metadata, dict) or not major.isdigit() or int(major) < 6:
        raise UserError(
            f"--sae {source} was written by SAELens {version or 'before 6'}: open it with sae_lens "
            "6 (SAE.load_from_disk), save it with save_model, and give the new folder"
        )
    scaler = folder / "activation_scaler.json"
    if scaler.is_file() and (files.read_json(scaler) or {}).get("scaling_factor") is not None:
        raise UserError(
            f"--sae {source} is a SAELens training checkpoint whose input scale is not folded in: "
            "give the folder of the finished SAE"
        )
    try:
        spec = _spec_from_config(config, source)
        tensors = files.read_tensors(folder / _WEIGHTS)
    except UserError as error:
        raise UserError(_naming_sae(str(error), source)) from error
    kind = DTYPES[spec.dtype]  # SAELens casts every tensor to the stated dtype, and so do we
    tensors = {name: tensor.to(kind) for name, tensor in tensors.items()}
    _check_tensors(tensors, spec, f"--sae {source}")
    # The reader maps the file: own the memory, so that the file may be replaced meanwhile.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return SAE(spec=spec, **tensors, source=source, sha256=files.sha256_file(folder / _WEIGHTS))


def _load_release(text: str) -> SAE:
    """`RELEASE:ID` through `sae_lens.SAE.from_pretrained`."""
    from saesteer.checkpoints.model_files import hub_call, quiet

    release, sae_id = text.split(":", 1)
    with quiet():
        import sae_lens

        loaded = hub_call(
            lambda: sae_lens.SAE.from_pretrained(release, sae_id, device="cpu"),
            f"--sae {text}",
            "give a folder, or a RELEASE:ID from SAELens' list of pretrained SAEs",
        )
    config = loaded.cfg.to_dict()
    config["metadata"] = files.plain(config.get("metadata") or {})
    spec = _spec_from_config(config, text)
    tensors = {name: tensor.detach().clone() for name, tensor in loaded.state_dict().items()}
    _check_tensors(tensors, spec, f"--sae {text}")
    return SAE(spec=spec, **tensors, source=text, sha256=_tensors_sha256(tensors))


def _spec_from_config(config: Mapping[str, Any], source: str) -> SAESpec:
    architecture = config.get("architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"--sae {source} has architecture {architecture!r}; we read "
            f"{', '.join(ARCHITECTURES)}: choose another SAE"
        )
    normalization = config.get("normalize_activations") or "none"
    if normalization not in NORMALIZATIONS:
        raise UserError(
            f"--sae {source} normalises activations by {normalization!r}; we compute "
            f"{' and '.join(NORMALIZATIONS)}: choose another SAE"
        )
    if config.get("reshape_activations", "none") != "none":
        raise UserError(
            f"--sae {source} reads attention heads (reshape_activations "
            f"{config['reshape_activations']!r}); we read residual-stream SAEs: choose another SAE"
        )
    absent = [key for key in ("d_in", "d_sae", "dtype") if key not in config]
    if absent:
        raise UserError(f"--sae {source}: {_CFG} lacks {', '.join(absent)}; restore the file")
    metadata = dict(config["metadata"])
    topk = architecture == "topk"
    try:
        return SAESpec(
            architecture=cast(Architecture, architecture),
            d_model=int(config["d_in"]),
            d_sae=int(config["d_sae"]),
            k=int(config["k"]) if topk and config.get("k") is not None else None,
            apply_b_dec_to_input=bool(config.get("apply_b_dec_to_input", True)),
            normalize_activations=normalization,
            rescale_acts_by_decoder_norm=topk
            and bool(config.get("rescale_acts_by_decoder_norm", False)),
            dtype=str(config["dtype"]).removeprefix("torch."),
            hook_name=metadata.pop("hook_name", None) or "",
            hf_hook_name=metadata.pop("hf_hook_name", None) or "",
            model_name=metadata.pop("model_name", None) or "",
            metadata=metadata,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"--sae {source}: {_CFG} is wrong: {error}") from error


def _check_tensors(tensors: Mapping[str, Tensor], spec: SAESpec, what: str) -> None:
    """Names, shapes and values against the spec; the first wrong one raises a `UserError`."""
    shapes = {
        "W_enc": (spec.d_model, spec.d_sae),
        "b_enc": (spec.d_sae,),
        "W_dec": (spec.d_sae, spec.d_model),
        "b_dec": (spec.d_model,),
    }
    if spec.architecture == "jumprelu":
        shapes["threshold"] = (spec.d_sae,)
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
                f"and d_sae {spec.d_sae} ask for {list(shape)}; the config and the weights do not "
                "belong together"
            )
        if not bool(torch.isfinite(tensors[name]).all()):
            raise UserError(f"{what}: {name} holds NaN or infinity; make or download the SAE again")
    if spec.architecture == "jumprelu" and bool((tensors["threshold"] < 0).any()):
        _log.warning("%s: some thresholds are negative, which act like 0", what)


def _keep_top_k(q: Float[Tensor, "*batch d_sae"], k: int) -> Float[Tensor, "*batch d_sae"]:
    """relu of the k largest entries of each row, 0 elsewhere; among equals the lowest index."""
    ranked = torch.nan_to_num(q, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    last = ranked.topk(k, dim=-1).values[..., -1:]
    above, tied = ranked > last, ranked == last
    room = k - above.sum(dim=-1, keepdim=True)
    keep = above | (tied & (tied.cumsum(dim=-1) <= room))
    return torch.where(keep, torch.relu(q), torch.zeros_like(q))


def _tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _naming_sae(message: str, source: str) -> str:
    return message if "--sae" in message else f"--sae {source}: {message}"


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        _dtype_name(dtype)
        return dtype
    if dtype not in DTYPES:
        raise UsageError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def _dtype_name(dtype: torch.dtype) -> str:
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise UsageError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype}")
