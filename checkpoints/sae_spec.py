"""What an SAE computes and where it reads: its specification, without weights.

Every format in `saesteer.checkpoints.formats` is read into this one description. The equation that
it describes is in `saesteer.checkpoints.sparse_autoencoder`.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from saesteer.checkpoints.errors import UsageError

Architecture = Literal[
    "topk", "standard", "jumprelu", "gated", "abstopk", "groupmax", "matching_pursuit"
]
ARCHITECTURES: tuple[str, ...] = get_args(Architecture)

TOPK_FAMILY = ("topk", "abstopk")
"""Architectures that may choose latents in units of their decoder row."""

TOKEN_NORMALIZATIONS = ("layer_norm", "constant_norm_rescale")
"""Modes that scale each token by its own number, so that they cannot be folded into the weights."""

# "expected_average_only_in" scales activations in training only; at inference SAELens ignores it,
# and so do we.
NORMALIZATIONS = ("none", "expected_average_only_in", *TOKEN_NORMALIZATIONS)

RESHAPES = ("none", "hook_z")

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

_SITE_HOOKS = {
    "resid_post": "hook_resid_post",
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
}
_HOOK_SITES = {hook: site for site, hook in _SITE_HOOKS.items()}
# As dictionary_learning names a submodule.
_SITE_OF_LAYER = re.compile(
    r"(resid_pre|resid_mid|resid_post|attn_out|attention_out|mlp_out)_layer_(\d{1,9})"
)
_BLOCK_PATH = re.compile(r"(?:.*\.)?(?:layers|h|blocks|block|layer)\.(\d+)")


def hook_name_for(layer: int, site: str) -> str:
    """The TransformerLens name of a site: (12, "resid_post") gives "blocks.12.hook_resid_post".

    A site that is a module path is its own name.
    """
    return f"blocks.{layer}.{_SITE_HOOKS[site]}" if site in _SITE_HOOKS else site


def parse_hook_name(hook_name: str | None) -> tuple[int | None, str | None]:
    """The layer and site of a hook name; None for what it does not say.

    Understands TransformerLens names ("blocks.12.hook_resid_post") and the module path of a block
    ("model.layers.12", whose output is resid_post), and dictionary_learning's
    "resid_post_layer_12". Any other module path is returned as the site.
    """
    if not hook_name:
        return None, None
    named = _SITE_OF_LAYER.fullmatch(hook_name)
    if named:
        return int(named.group(2)), named.group(1).replace("attention", "attn")
    found = re.fullmatch(r"blocks\.(\d{1,9})\.(hook_\w+)", hook_name)
    if found and found.group(2) in _HOOK_SITES:
        return int(found.group(1)), _HOOK_SITES[found.group(2)]
    if block := _BLOCK_PATH.fullmatch(hook_name):
        return int(block.group(1)), "resid_post"
    number = re.search(r"\.(\d{1,9})(?:\.|$)", hook_name)
    return (int(number.group(1)) if number else None), (None if "hook_" in hook_name else hook_name)


@dataclass(frozen=True, kw_only=True)
class SAESpec:
    """What an SAE computes and where it reads, without its weights."""

    architecture: Architecture
    """Which activation; see `SAE.encode`. A ReLU is called "standard"."""
    d_model: int
    """Width of the activations it reads."""
    d_sae: int
    """Number of latents."""
    d_out: int | None = None
    """Width of what it writes, for a transcoder; None for an SAE, which writes what it reads."""
    k: int | None = None
    """Latents kept per token, or groups of a groupmax; None for the other architectures."""
    apply_b_dec_to_input: bool = False
    """Whether b_dec is subtracted from the input."""
    normalize_activations: str = "none"
    """One of `NORMALIZATIONS`; the first two have no effect at inference."""
    reshape_activations: str = "none"
    """"hook_z" when its input is the outputs of all attention heads, side by side."""
    rescale_acts_by_decoder_norm: bool = False
    """For topk and abstopk: whether latents are chosen, and given, in units of their decoder
    row."""
    residual_threshold: float = 0.0
    """matching_pursuit: no more latents are chosen once the residual is shorter than this; 0 sets
    no limit."""
    max_iterations: int | None = None
    """matching_pursuit: largest number of rounds; None means d_model."""
    stop_on_duplicate_support: bool = True
    """matching_pursuit: stop once a round has chosen no new latent."""
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
        if self.d_out is not None and self.d_out < 1:
            raise UsageError(f"d_out must be positive, got {self.d_out}")
        counted = self.architecture in (*TOPK_FAMILY, "groupmax")
        if counted and not (self.k and 0 < self.k <= self.d_sae):
            raise UsageError(f"k must be in 1..{self.d_sae} (d_sae), got {self.k}")
        if self.architecture == "groupmax" and self.d_sae % (self.k or 1):
            raise UsageError(
                f"groupmax needs groups of one size, and k {self.k} does not divide d_sae "
                f"{self.d_sae}"
            )
        if self.architecture not in TOPK_FAMILY and self.rescale_acts_by_decoder_norm:
            raise UsageError("rescale_acts_by_decoder_norm is for topk only; leave it out")
        if self.architecture == "matching_pursuit":
            self._check_pursuit()
        if self.normalize_activations not in NORMALIZATIONS:
            raise UsageError(
                f"normalize_activations must be one of {', '.join(NORMALIZATIONS)}, "
                f"got {self.normalize_activations!r}"
            )
        if self.reshape_activations not in RESHAPES:
            raise UsageError(
                f"reshape_activations must be one of {', '.join(RESHAPES)}, "
                f"got {self.reshape_activations!r}"
            )
        if self.apply_b_dec_to_input and self.d_out is not None:
            raise UsageError(
                "a transcoder's b_dec is for its output: apply_b_dec_to_input must be false"
            )
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    def _check_pursuit(self) -> None:
        if self.d_out is not None:
            raise UsageError(
                "matching_pursuit reads with its decoder's rows, so d_out must be left out"
            )
        if not 0 <= self.residual_threshold < math.inf:
            raise UsageError(
                f"residual_threshold must be a number >= 0, got {self.residual_threshold}"
            )
        if self.max_iterations is not None and not 1 <= self.max_iterations <= 2**20:
            raise UsageError(f"max_iterations must be in 1..{2**20}, got {self.max_iterations}")

    @property
    def layer(self) -> int | None:
        """0-based block that it reads, from the hook name; None when the name does not say."""
        return self._place[0]

    @property
    def site(self) -> str | None:
        """What it reads: "resid_post" and so on, or a module path; None when no name says."""
        return self._place[1]

    @property
    def is_transcoder(self) -> bool:
        """Whether it writes elsewhere than it reads."""
        return self.d_out is not None

    @property
    def scales_tokens(self) -> bool:
        """Whether each token of the input is normalised by its own scale, see `SAE.token_scale`."""
        return self.normalize_activations in TOKEN_NORMALIZATIONS

    @property
    def reads_alone(self) -> bool:
        """Whether each latent can be computed alone, from its own column of W_enc."""
        return self.architecture in ("standard", "jumprelu")

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
