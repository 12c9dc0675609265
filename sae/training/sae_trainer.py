"""One SAE in training: its parameters, and one step."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import NonFiniteError
from saesteer.checkpoints.places import Place, without_model
from saesteer.checkpoints.sae_file import SAE, SAESpec, hook_name_for, save_sae
from saesteer.checkpoints.shards import folder_name
from saesteer.sae.config import TrainConfig, default_lr
from saesteer.sae.training.architecture import Architecture, Parameters, Pass
from saesteer.sae.training.cuda_graph import GraphedStep
from saesteer.sae.training.dead_latents import SilenceCounter
from saesteer.sae.training.input_scale import InputScale, PlacedRows
from saesteer.sae.training.mesh.across import ALONE, Across
from saesteer.sae.training.optimiser import Optimiser

if TYPE_CHECKING:  # torch.distributed takes a while to import, and most runs are of one process
    from saesteer.sae.training.mesh.mesh import Mesh


@dataclass(frozen=True)
class Variant:
    """One SAE of a run: where it reads and writes, its size, architecture and seed."""

    reads: tuple[Place, ...]
    writes: tuple[Place, ...]
    """The same as `reads` for an SAE."""
    d_sae: int
    architecture: Architecture
    init_seed: int

    @property
    def folder(self) -> str:
        """A folder name that no other SAE of the run has."""
        where = "+".join(folder_name(*place) for place in self.reads)
        if self.writes != self.reads:
            where += "-to-" + "+".join(folder_name(*place) for place in self.writes)
        return f"{where}_dsae-{self.d_sae}_{self.architecture.label}_seed-{self.init_seed}"

    @property
    def places(self) -> tuple[Place, ...]:
        """The places that it reads or writes, each once."""
        return tuple(dict.fromkeys((*self.reads, *self.writes)))


class SAETrainer:
    """The parameters of one SAE, its optimiser, and one step of training.

    In a mesh it has its part of the latents, and its part of the rows of each batch.

    A step is `forward` (the losses, and what the gradients are made of) and `step` (the parameters
    move). In neither does the host wait for the device: counts are kept there, and read by
    `take_log`.
    """

    def __init__(
        self,
        variant: Variant,
        config: TrainConfig,
        scales: Mapping[Place, InputScale],
        device: torch.device,
        mesh: "Mesh | None" = None,
    ) -> None:
        """`scales`: those of the variant's places, measured on a sample; `mesh`: the processes that
        train it together, None for one."""
        self.variant = variant
        self.architecture = variant.architecture
        self.config = config
        self.device = device
        self.mesh = mesh
        self.across: Across = ALONE if mesh is None else mesh
        self.read = [scales[place] for place in variant.reads]
        self.write = [scales[place] for place in variant.writes]
        sizes = (self.d_in, self.d_out, variant.d_sae, variant.init_seed)
        self.optimiser: Optimiser
        if mesh is None:
            made = self.architecture.initialise(*sizes, device)
            self.optimiser = Optimiser(self.architecture, made, config, device)
        else:
            from saesteer.sae.training.mesh.optimiser import SharedOptimiser

            made = self.architecture.initialise(*sizes, device, mesh.own_latents(variant.d_sae))
            self.optimiser = SharedOptimiser(self.architecture, made, config, device, mesh)
        del made
        own_d_sae = variant.d_sae // self.across.latent_parts
        self.buffers = self.architecture.buffers(own_d_sae, device)
        self.silence = SilenceCounter(own_d_sae, config.resolved_dead_after_tokens, device)
        self.steps_taken = 0
        self.peak_lr = config.lr or default_lr(self.d_in, variant.d_sae, config.steps)
        # Squared error, squared deviation, active latents, rows.
        self._log = torch.zeros(4, dtype=torch.float64, device=device)
        self._scales = {place: scales[place].to(device) for place in variant.places}
        self._graphed = GraphedStep(self) if config.cuda_graph and device.type == "cuda" else None

    @property
    def parameters(self) -> Parameters:
        """Those of this process's latents, as passes take them."""
        return self.optimiser.whole

    @property
    def d_in(self) -> int:
        """Width of the input: that of all places read, side by side."""
        return sum(len(scale.mean) for scale in self.read)

    @property
    def d_out(self) -> int:
        """Width of the output: that of all places written, side by side."""
        return sum(len(scale.mean) for scale in self.write)

    def lr(self) -> float:
        """Learning rate of the coming step: linear warm-up, constant, linear decay to zero."""
        steps, warmup = self.config.steps, self.config.resolved_warmup_steps
        decay = max(1, round(steps * self.config.decay_share))
        rising = (self.steps_taken + 1) / warmup if warmup else 1.0
        falling = (steps - self.steps_taken) / decay
        return self.peak_lr * min(1.0, rising, falling)

    def forward(self, batch: PlacedRows) -> list[Pass]:
        """The losses of a batch, and what the gradients are made of. No parameter changes.

        One pass, or one for each `micro_batch_tokens` rows. Raises NonFiniteError when a loss is
        NaN or infinite (on a GPU `take_log` does, and no parameter has changed since).
        """
        rows = {
            place: batch.at(place).to(self.device, non_blocking=True)
            for place in self.variant.places
        }
        if self._graphed is not None:
            return self._graphed.take(rows)
        return self.losses(rows)

    def losses(self, rows: Mapping[Place, Tensor]) -> list[Pass]:
        """`forward` on rows that lie on the device already, in raw units."""
        dead = self.silence.listed(self._tokens_seen) if self.architecture.uses_dead else None
        parameters = {**self.optimiser.in_products, **self.buffers}
        x, target = self._scaled(rows, parameters["W_enc_rows"].dtype)
        size = (self.config.micro_batch_tokens or 0) // self.across.row_parts or max(1, len(x))
        passes = [
            self.architecture.loss(parameters, *part, dead, self.across)
            for part in zip(x.split(size), target.split(size), strict=True)
        ]
        if self.device.type == "cpu":
            self._check_losses(all(bool(torch.isfinite(p.loss)) for p in passes))
        return passes

    def _check_losses(self, finite: bool) -> None:
        """Raise NonFiniteError, in all processes, where those of one are not finite."""
        if self.mesh is None:
            if not finite:
                raise self._not_finite()
            return
        (failed,) = self.mesh.flags(not finite)
        if any(failed):
            raise self._not_finite(failed.index(True))

    def _scaled(
        self, rows: Mapping[Place, Tensor], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]:
        """Input and target in the units of training; one tensor where they are the same."""
        scaled = {place: scale.apply(rows[place]) for place, scale in self._scales.items()}

        def side_by_side(places: tuple[Place, ...]) -> Tensor:
            parts = [scaled[place] for place in places]
            return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).to(dtype)

        x = side_by_side(self.variant.reads)
        same = self.variant.writes == self.variant.reads
        return x, x if same else side_by_side(self.variant.writes)

    def step(self, passes: list[Pass]) -> None:
        """Move the parameters along the gradients of `forward` and count which latents fired."""
        self.optimiser.set_step(self.steps_taken + 1, self.lr())
        self.steps_taken += 1
        if self._graphed is not None:
            self._graphed.replay()
        else:
            self.apply(passes)

    def apply(self, passes: list[Pass]) -> None:
        """The part of `step` that runs on the device; what the host decides is in tensors."""
        counts = self.optimiser.move(passes)
        self.architecture.update_buffers(self.buffers, passes, self.across)
        rows = sum(sae_pass.examples for sae_pass in passes) * self.across.row_parts
        self.silence.count(counts, rows)
        error = sum(sae_pass.squared_error for sae_pass in passes)
        active = counts.sum()
        if self.mesh is not None:
            error, active = self._of_all(torch.as_tensor(error), active)
        self._log[0] += error
        self._log[1] += sum(sae_pass.squared_deviation for sae_pass in passes)
        self._log[2] += active
        self._log[3] += rows

    def _of_all(self, error: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """The squared errors of all rows, and the active latents of all, of this process's."""
        by_rows = error if self.across.latent_part == 0 else torch.zeros_like(error)
        by_latents = active if self.across.row_part == 0 else torch.zeros_like(active)
        sums = self.across.all(torch.stack([by_rows.double(), by_latents.double()]))
        return sums[0], sums[1]

    @property
    def _tokens_seen(self) -> int:
        return self.steps_taken * self.config.batch_tokens

    def shape_key(self) -> object:
        """What decides the shapes of the next step, apart from its rows."""
        if not self.architecture.uses_dead:
            return None
        return self.silence.list_length(self._tokens_seen)

    def check_finite(self) -> None:
        """Raise NonFiniteError when a step since the last log line was left out for its loss.

        Waits for a GPU. A state saved after such a step would silently lack it.
        """
        if bool(self.optimiser.failed):
            raise self._not_finite()

    def _not_finite(self, rank: int | None = None) -> NonFiniteError:
        where = "" if rank is None else f" in process {rank}"
        return NonFiniteError(
            f"the loss of {self.variant.folder} is not finite at step {self.steps_taken}{where}: "
            f"the last state before it was kept; lower `lr` (now {self.peak_lr:.2g}) or look at "
            "the data there"
        )

    def take_log(self) -> dict[str, float]:
        """FVU, L0 and the dead fraction of the batches since the last call.

        Only here does the host wait for a GPU. Raises NonFiniteError when a loss since then was not
        finite: the parameters are those before that step.
        """
        dead = self.across.latents(self.silence.dead.sum())
        error, deviation, active, rows, n_dead, failed = torch.stack(
            [*self._log, dead.double(), self.optimiser.failed.double()]
        ).tolist()
        if failed:
            raise self._not_finite()
        if self.silence.capacity:
            self.silence.make_room()
        self._log.zero_()
        return {
            "fvu": error / max(deviation, 1e-30),
            "l0": active / max(rows, 1),
            "dead_fraction": n_dead / self.variant.d_sae,
            "lr": self.lr() if self.steps_taken < self.config.steps else 0.0,
        }

    @torch.no_grad()
    def calibrate(self, rows: PlacedRows) -> dict[str, float]:
        """Let the architecture set its buffers after the last step; see `Architecture.calibrate`.

        Raises NonFiniteError when a step on a GPU was left out.
        """
        self.check_finite()
        own = rows.part(self.across.row_part, self.across.row_parts)
        placed = {place: own.at(place).to(self.device) for place in self.variant.places}
        x, _ = self._scaled(placed, torch.float32)
        parameters = self.optimiser.in_float32()
        return self.architecture.calibrate(parameters, self.buffers, x, self.across)

    def spec(self, facts: dict[str, Any]) -> SAESpec:
        """The SAE's specification in canonical form, as trained so far; `facts` are the run's."""
        variant = self.variant
        layer, site = variant.reads[0]
        own = self.architecture.spec()
        more = dict(own.pop("metadata", {}))
        hooks = {place: _hook_names(place, facts) for place in variant.places}
        transcodes = variant.writes != variant.reads
        alone = len(variant.reads) == 1
        facts_of_run: dict[str, Any] = {
            "model": facts["model"],
            "layer": layer,
            "site": site,
            "tokens": self._tokens_seen,
            "text": facts["text"],
            "input_scale": self.read[0].factor,
        }
        if transcodes:
            to_layer, to_site = variant.writes[0]
            facts_of_run |= {"to_layer": to_layer, "to_site": to_site}
            names = zip(
                ("hook_name_out", "hf_hook_name_out"), hooks[variant.writes[0]], strict=True
            )
            more = {**more, **dict(names)}
        if not alone:
            facts_of_run["crosscoder"] = self._parts(hooks, facts)
        hook_name, hf_hook_name = hooks[variant.reads[0]]
        return SAESpec(
            **own,
            d_model=self.d_in,
            d_sae=variant.d_sae,
            d_out=self.d_out if transcodes else None,
            # A crosscoder reads no hook: its parts do.
            hook_name=hook_name if alone else "",
            hf_hook_name=hf_hook_name if alone else "",
            model_name=facts["model"].get("name", ""),
            metadata={
                "context_size": facts["context"],
                "prepend_bos": facts["prepend_bos"],
                "saesteer": facts_of_run,
                **more,
            },
        )

    def _parts(
        self, hooks: Mapping[Place, tuple[str, str]], facts: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """The places that a crosscoder reads side by side, in order."""
        parts = []
        for place, scale in zip(self.variant.reads, self.read, strict=True):
            (layer, site), number = without_model(place)
            models = facts.get("models") or [facts["model"]]
            parts.append(
                {
                    "layer": layer,
                    "site": site,
                    "hook_name": hooks[place][0],
                    "hf_hook_name": hooks[place][1],
                    "d_model": len(scale.mean),
                    "input_scale": scale.factor,
                    "model": models[min(number, len(models) - 1)],
                }
            )
        return parts

    def as_sae(self, facts: dict[str, Any]) -> SAE:
        """The SAE in canonical form, as trained so far; of this process's latents."""
        return self._canonical(self.optimiser.in_float32(), self.buffers, facts)

    def _canonical(
        self, parameters: Parameters, buffers: Mapping[str, Tensor], facts: dict[str, Any]
    ) -> SAE:
        tensors = self.architecture.canonical(parameters, self.read, self.write, buffers)
        spec = self.spec(facts)
        if (d_sae := len(tensors["W_dec"])) != spec.d_sae:
            spec = replace(spec, d_sae=d_sae)
        return SAE(spec=spec, **cast(dict[str, Any], tensors))

    def save(self, folder: Path, facts: dict[str, Any]) -> str:
        """Write the SAE in canonical form; returns the SHA-256 of its weights. In a mesh the first
        process gathers and writes it; others return nothing."""
        parameters = self.optimiser.gathered_parameters()
        buffers = self._gathered(self.buffers)
        if self.mesh is not None and not self.mesh.first:
            return ""
        sae = self._canonical(parameters, buffers, facts)
        return save_sae(folder, sae.spec, **sae.tensors())

    def own(self, values: Tensor) -> Tensor:
        """This process's latents, of a tensor of all; a number as it is."""
        return values[self.across.own_latents(len(values))] if values.dim() else values

    def _gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by latent as one process has them, on the first process; nothing on others."""
        if self.mesh is None:
            return dict(tensors)
        found = {
            name: self.mesh.on_first(tensor, by_rows=False, by_latents=tensor.dim() > 0)
            for name, tensor in tensors.items()
        }
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def state_dict(self) -> dict[str, Tensor]:
        """All that a step depends on, by name; shares memory with this trainer. In a mesh the first
        process has all of it, and others nothing that counts."""
        by_latent = {f"buffer.{name}": tensor for name, tensor in self.buffers.items()}
        by_latent["tokens_since_fired"] = self.silence.tokens_since_fired
        state = {**self.optimiser.gathered(), **self._gathered(by_latent)}
        state["step"] = torch.tensor(self.steps_taken)
        state["dead_capacity"] = torch.tensor(self.silence.capacity)
        state["log"] = self._log
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue where `state_dict` was taken."""
        self.optimiser.load_state_dict(state)
        for name, tensor in self.buffers.items():
            tensor.copy_(self.own(state[f"buffer.{name}"]))
        since = self.silence.tokens_since_fired
        since.copy_(self.own(state["tokens_since_fired"]))
        self.steps_taken = int(state["step"])
        self.silence.capacity = min(int(state["dead_capacity"]), len(since))
        self._log.copy_(state["log"])


def _hook_names(place: Place, facts: dict[str, Any]) -> tuple[str, str]:
    """The TransformerLens name of a place and its module path, empty where it is not known."""
    (layer, site), _ = without_model(place)
    hook_name = hook_name_for(layer, site.replace("{layer}", str(layer)))
    return hook_name, facts["hf_hook_names"].get(place, "")
