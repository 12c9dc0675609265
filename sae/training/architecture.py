"""The interface between the trainer and the kinds of SAE that it trains.

An architecture is one file in `architectures/`: a frozen dataclass of its own settings that says
which parameters it has, how they start, what one pass over a batch gives (the loss, and what the
gradients are made of), and what the finished SAE is called. The trainer handles parameters, passes
and counts of firings; it knows neither k nor any other setting.

Legend of dimensions: B batch, I d_in, O d_out (both d_model for an SAE, which writes what it reads;
the sums over its places for a crosscoder), F d_sae, E entries: the pairs of an example and a latent
that take part. Both matrices are kept latent-major: `W_enc_rows [F, I]`, `W_dec [F, O]`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saesteer.checkpoints.errors import UsageError
from saesteer.checkpoints.folds import fold_centred_scale
from saesteer.checkpoints.places import Place
from saesteer.kernels.ops import LatentOrder, sparse_pair_grads
from saesteer.sae.config import TrainConfig
from saesteer.sae.training.input_scale import InputScale
from saesteer.sae.training.mesh.across import ALONE, Across

Arrangement = tuple[tuple[Place, ...], tuple[Place, ...]]
"""The places that an SAE reads, and those that it writes."""

Parameters = dict[str, Tensor]
"""What the optimiser moves, in the units of x~, by name."""

ENTRY_PARAMETERS = ("W_enc_rows", "W_dec", "b_enc")
"""Parameters whose gradients are sums over entries: `Pass.encoder`, `Pass.decoder`, and the sum of
the encoder's weights. Those of all others are in `Pass.dense`."""

ALL = slice(None)
"""All latents."""

OF_PENALTIES = ("l0", "coefficient", "sparsity_warmup_steps", "jumprelu")
"""Settings of `TrainConfig` that only architectures with a target for L0 have."""


@dataclass(frozen=True)
class DeadList:
    """The dead latents of a step."""

    ids: Int[Tensor, " dead"]
    is_filler: Bool[Tensor, " dead"] | None = None
    """Entries of `ids` that only fill a list of fixed length; None where there are none."""


@dataclass(frozen=True)
class EntrySum:
    """The gradient of a matrix: its row f is `Pass.factor` times the sum, over the entries of
    latent f, of the entry's weight times the row of the entry's example. Examples that are pieces
    of one may share a row."""

    weights: Float[Tensor, "batch k"] | Float[Tensor, " entries"]
    rows: Float[Tensor, "rows width"]


@dataclass(frozen=True)
class CompactGradients:
    """Further gradients, of a few latents only: those of an auxiliary loss."""

    ids: Int[Tensor, " few"]
    W_enc_rows: Float[Tensor, "few d_in"]
    b_enc: Float[Tensor, " few"]
    W_dec: Float[Tensor, "few d_out"]


@dataclass
class Pass:
    """A batch, or a part of one, through an SAE: its loss, and what the gradients are made of.

    FVU is squared_error / squared_deviation.
    """

    loss: Float[Tensor, ""]
    """Mean over the rows of the pass; where several processes share them out, this one's part."""
    squared_error: Float[Tensor, ""]
    """Sum of |reconstruction - target|^2 over the rows of this process."""
    squared_deviation: Float[Tensor, ""]
    """Sum of |target - mean target|^2 over the rows of all processes."""
    examples: int
    """Rows of the pass that this process has."""
    latent_acts: Float[Tensor, "batch k"] | Float[Tensor, " entries"]
    """A latent fired in an entry whose activation is not 0."""
    latent_indices: Int[Tensor, "batch k"] | Int[Tensor, " entries"]
    order: LatentOrder
    """The entries grouped by latent."""
    decoder: EntrySum
    """Its weights are `latent_acts`."""
    encoder: EntrySum
    """Its weights are the derivatives by the pre-activations."""
    factor: float
    """What both sums are multiplied by."""
    row_starts: Int[Tensor, " starts"] | None = None
    """Where examples have different numbers of entries: those of example b are entries
    row_starts[b]:row_starts[b + 1]. None for a rectangle `[batch, k]`."""
    dense: dict[str, Tensor] = field(default_factory=dict)
    """Gradients of other parameters in full size, and further terms of those of
    `ENTRY_PARAMETERS`."""
    compact: CompactGradients | None = None
    measured: dict[str, Tensor] = field(default_factory=dict)
    """What `Architecture.update_buffers` learns from the pass."""
    fired: Int[Tensor, " d_sae"] | None = None
    """How often each latent fired, of a pass without entries, all of whose gradients are in
    `dense`: many latents took part, and whole products were faster. None where entries say it."""

    @property
    def only_entries(self) -> bool:
        """Whether both matrices can be moved row by row, without a gradient of their size."""
        return not self.dense.keys() & {"W_enc_rows", "W_dec"}


class Architecture(ABC):
    """One kind of SAE with its settings; subclasses are frozen dataclasses."""

    name: ClassVar[str]
    """Its name as `arch` takes it."""
    unit_rows: ClassVar[frozenset[str]] = frozenset({"W_dec"})
    """Matrices whose rows keep length 1."""
    of_no_latent: ClassVar[frozenset[str]] = frozenset({"b_dec"})
    """Parameters without a row for each latent."""
    canonical_names: ClassVar[Mapping[str, str]] = {
        "W_enc_rows": "W_enc",
        "b_enc": "b_enc",
        "W_dec": "W_dec",
        "b_dec": "b_dec",
    }
    """The name in an SAE's file of each parameter that is written there; `W_enc` is transposed."""
    lr_factors: ClassVar[Mapping[str, float]] = {}
    """Parameters that move at another rate than the rest: by how many times."""
    canonical_buffers: ClassVar[Mapping[str, str]] = {}
    """The same for buffers."""
    transcodes: ClassVar[bool] = False
    """Whether it writes elsewhere than it reads: `to_layer` and `to_site` say where."""
    calibrates: ClassVar[bool] = False
    """Whether `calibrate` wants rows at the end of training."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: TrainConfig) -> Sequence["Architecture"]:
        """One architecture for each combination of its settings in `config`.

        Raises UsageError for settings that it does not take.
        """

    @classmethod
    def arrangements(cls, reads: Sequence[Place], writes: Sequence[Place]) -> list[Arrangement]:
        """What each SAE of a run reads and writes, from the places asked for.

        Raises UsageError for places that do not fit.
        """
        return [((place,), (place,)) for place in reads]

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Its own settings, for `run.json`: plain values by name."""

    @property
    def label(self) -> str:
        """Its settings as a part of a folder's name."""
        return "_".join(f"{name}-{value}" for name, value in self.settings.items())

    @property
    def uses_dead(self) -> bool:
        """Whether `loss` needs to know which latents are dead."""
        return False

    def at_width(self, d_sae: int) -> "Architecture":
        """The same with settings that depend on the number of latents worked out."""
        return self

    def at_places(self, reads: Sequence[int], writes: Sequence[int]) -> "Architecture":
        """The same with settings that depend on the widths of its places worked out."""
        return self

    def check(self, d_sae: int) -> None:  # noqa: B027 (most have nothing to check)
        """Raise UsageError where the settings do not fit this number of latents."""

    def shapes(self, d_in: int, d_out: int, d_sae: int) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter."""
        return {
            "W_enc_rows": (d_sae, d_in),
            "W_dec": (d_sae, d_out),
            "b_enc": (d_sae,),
            "b_dec": (d_out,),
        }

    def parameter_count(self, d_in: int, d_out: int, d_sae: int) -> int:
        """How many numbers the optimiser moves."""
        return sum(math.prod(shape) for shape in self.shapes(d_in, d_out, d_sae).values())

    @abstractmethod
    def initialise(
        self,
        d_in: int,
        d_out: int,
        d_sae: int,
        seed: int,
        device: torch.device,
        own: slice = ALL,
    ) -> Parameters:
        """Parameters to start from, of the shapes that `shapes` gives; of the latents `own`, and
        with no more memory than those need."""

    def buffers(self, d_sae: int, device: torch.device) -> dict[str, Tensor]:
        """What training keeps besides parameters, by name: steps measure it, none optimises it."""
        return {}

    @abstractmethod
    def loss(
        self,
        parameters: Parameters,
        x: Float[Tensor, "batch d_in"],
        target: Float[Tensor, "batch d_out"],
        dead: DeadList | None,
        across: Across = ALONE,
    ) -> Pass:
        """Reconstruct `target` from `x`, both in the units of x~.

        `parameters` holds the buffers as well. Matrices and `x` may be in bfloat16. Nothing may
        wait for the device. Other processes may have other rows of the batch, or other latents:
        means and choices are over all of them, by `across`, and gradients add up to those of the
        whole over the processes that have the same latents.
        """

    def after_step(self, parameters: Parameters) -> None:  # noqa: B027 (most have no range)
        """Move parameters that a step may have moved out of their range back, in place."""

    def update_buffers(  # noqa: B027 (most have none)
        self, buffers: Mapping[str, Tensor], passes: Sequence[Pass], across: Across = ALONE
    ) -> None:
        """Change buffers, in place, by what the passes of a step have measured.

        Nothing may wait for the device.
        """

    def calibrate(
        self,
        parameters: Parameters,
        buffers: Mapping[str, Tensor],
        x: Float[Tensor, "rows d_in"],
        across: Across = ALONE,
    ) -> dict[str, float]:
        """After the last step: set buffers, in place, on rows that come after those of training.

        Returns what the run's record says of it, by name. Called if `calibrates`. Processes may
        have different numbers of rows.
        """
        return {}

    @abstractmethod
    def spec(self) -> dict[str, Any]:
        """The fields of an `SAESpec` that say what it computes, such as architecture and k.

        Entries of `metadata` come on top of what the trainer writes there.
        """

    def canonical(
        self,
        parameters: Parameters,
        read: Sequence[InputScale],
        write: Sequence[InputScale],
        buffers: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Float[Tensor, "..."]]:
        """The same SAE on raw activations, latents in units of the (first) place it writes."""
        named = {ours: parameters[name] for name, ours in self.canonical_names.items()}
        named |= {ours: (buffers or {})[name] for name, ours in self.canonical_buffers.items()}
        return fold_centred_scale(
            named, [(s.mean, s.factor) for s in read], [(s.mean, s.factor) for s in write]
        )


def refuse_others(config: TrainConfig, *names: str) -> None:
    """Raise UsageError where a setting that the architecture lacks is not what it is by default."""
    usual = TrainConfig()
    for name in names:
        value, default = getattr(config, name), getattr(usual, name)
        if is_dataclass(value):
            changed = [
                f.name for f in fields(value) if getattr(value, f.name) != getattr(default, f.name)
            ]
            name, value = (changed[0], getattr(value, changed[0])) if changed else (name, default)
        if value != default:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            instead = {"k": "give `l0`", "l0": "give `k`"}.get(name, "leave it out")
            raise UsageError(
                f"`{name}` is no setting of `arch` {config.arch}, got {shown}: {instead}"
            )


@torch.no_grad()
def gradients(sae_pass: Pass, d_sae: int) -> tuple[dict[str, Tensor], Int[Tensor, " d_sae"]]:
    """Gradients of `loss` by every parameter, and how often each latent fired.

    They are of the parameters' size, as clipping and accumulation need them. The trainer's fast
    path steps from the entries themselves.
    """
    grads: dict[str, Tensor] = {}
    counts = sae_pass.fired
    if counts is None:
        decoder, encoder = sae_pass.decoder, sae_pass.encoder
        W_dec, W_enc, b_enc, counts = sparse_pair_grads(
            decoder.weights,
            decoder.rows,
            encoder.weights,
            encoder.rows,
            sae_pass.latent_indices,
            d_sae,
            sae_pass.order,
            row_starts=sae_pass.row_starts,
        )
        grads = {"W_enc_rows": W_enc, "W_dec": W_dec, "b_enc": b_enc}
        for grad in grads.values():
            grad.mul_(sae_pass.factor)
    for name, part in sae_pass.dense.items():
        grads[name] = grads[name] + part if name in grads else part
    if sae_pass.compact is not None:
        for name in ENTRY_PARAMETERS:
            grads[name][sae_pass.compact.ids] += getattr(sae_pass.compact, name)
    return grads, counts
