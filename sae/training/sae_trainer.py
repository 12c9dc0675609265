"""One SAE in training: its parameters, its optimiser state, and one step."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import NonFiniteError
from saesteer.checkpoints.sae_file import SAESpec, hook_name_for, save_sae
from saesteer.checkpoints.shards import folder_name
from saesteer.kernels.ops import adam_rows_, adam_schedule, adam_sparse_rows_
from saesteer.sae.config import TrainConfig, default_lr
from saesteer.sae.training.cuda_graph import GraphedStep
from saesteer.sae.training.topk import (
    InputScale,
    TopKPass,
    canonical,
    gradients,
    initialise,
    topk_pass,
)

_BETAS = (0.9, 0.999)
# With the loss of order 1 the gradients of single rows are tiny: Gao et al. use this epsilon.
_EPS = 6.25e-10


@dataclass(frozen=True)
class Variant:
    """One SAE of a run: where it reads and what it is made of."""

    place: tuple[int, str]
    d_sae: int
    k: int
    init_seed: int

    @property
    def folder(self) -> str:
        where = folder_name(*self.place)
        return f"{where}_dsae-{self.d_sae}_k-{self.k}_seed-{self.init_seed}"


class SAETrainer:
    """The parameters of one SAE, its optimiser state, and one step of training.

    A step is `backward` (the pass, and what its gradients are made of) and `update` (the move). The
    host waits for the device in neither: what is counted is counted there, and read by `take_log`.
    """

    def __init__(
        self,
        variant: Variant,
        config: TrainConfig,
        columns: slice,
        scale: InputScale,
        device: torch.device,
    ) -> None:
        self.variant = variant
        self.config = config
        self.columns = columns
        self.scale = scale
        self.device = device
        d_model = len(scale.mean)
        self.parameters = initialise(d_model, variant.d_sae, variant.init_seed, device)
        moments = torch.bfloat16 if config.moments == "bfloat16" else torch.float32
        self.exp_avg: dict[str, Tensor] = {}
        self.exp_avg_sq: dict[str, Tensor] = {}
        for name, parameter in self.parameters.named().items():
            # A bias is too small to be worth rounding.
            dtype = moments if parameter.dim() == 2 else torch.float32
            self.exp_avg[name] = torch.zeros_like(parameter, dtype=dtype)
            self.exp_avg_sq[name] = torch.zeros_like(parameter, dtype=dtype)
        self.shadows = self._make_shadows()
        self.tokens_since_fired = torch.zeros(variant.d_sae, dtype=torch.int64, device=device)
        self.step = 0
        self.peak_lr = config.lr or default_lr(variant.d_sae, config.steps)
        self._schedule = torch.zeros(3, dtype=torch.float64, device=device)
        # Set on the device once a loss is not finite; from then on no step moves anything.
        self._failed = torch.zeros((), dtype=torch.bool, device=device)
        self._dead_capacity = 0
        # Squared error, squared deviation, active latents, rows.
        self._log = torch.zeros(4, dtype=torch.float64, device=device)
        self._input = InputScale(scale.mean.to(device), scale.factor)
        self._graphed = GraphedStep(self) if config.cuda_graph and device.type == "cuda" else None

    def dead_list_length(self) -> int | None:
        """What decides the shapes of the coming step: room for the dead, None without AuxK."""
        seen = self.step * self.config.batch_tokens
        if not self.config.auxk or seen < self.config.resolved_dead_after_tokens:
            return None
        if self._dead_capacity == 0 and self.device.type != "cpu":
            self._set_dead_capacity()
        return self._dead_capacity

    def _make_shadows(self) -> dict[str, Tensor]:
        """bfloat16 copies of the matrices, for the products; empty with float32 products."""
        products = self.config.dtype
        if products == "auto":
            products = "bfloat16" if self.device.type == "cuda" else "float32"
        if products == "float32":
            return {}
        return {name: getattr(self.parameters, name).bfloat16() for name in ("W_enc_rows", "W_dec")}

    @property
    def dead(self) -> Tensor:
        """Latents silent for at least `dead_after_tokens` tokens, `[d_sae]` bool."""
        return self.tokens_since_fired >= self.config.resolved_dead_after_tokens

    def lr(self) -> float:
        """Learning rate of the coming step: linear warm-up, constant, linear decay to zero."""
        steps, warmup = self.config.steps, self.config.resolved_warmup_steps
        decay = max(1, round(steps * self.config.decay_share))
        rising = (self.step + 1) / warmup if warmup else 1.0
        falling = (steps - self.step) / decay
        return self.peak_lr * min(1.0, rising, falling)

    def backward(self, batch: Float[Tensor, "batch width"]) -> list[TopKPass]:
        """The batch through the SAE: losses, and what the gradients are made of. Nothing moves.

        One pass, or one for each `micro_batch_tokens` rows.

        Raises NonFiniteError when a loss is NaN or infinite (on a GPU `take_log` does, and nothing
        has moved since).
        """
        rows = batch[:, self.columns].to(self.device, non_blocking=True)
        if self._graphed is not None:
            return self._graphed.take(rows)
        return self.forward(rows)

    def forward(self, rows: Float[Tensor, "batch d_model"]) -> list[TopKPass]:
        """`backward` on rows that lie on the device already, in raw units."""
        dead_ids, alive = self._dead_latents()
        parameters = replace(self.parameters, **self.shadows)
        passes = []
        for part in rows.split(self.config.micro_batch_tokens or max(1, len(rows))):
            x = self._input.apply(part).to(parameters.W_enc_rows.dtype)
            done = topk_pass(
                parameters, x, self.variant.k,
                dead_ids=dead_ids, alive=alive, auxk=self.config.auxk,
            )  # fmt: skip
            passes.append(done)
        if self.device.type == "cpu" and not all(torch.isfinite(done.total) for done in passes):
            raise self._not_finite()
        return passes

    def update(self, passes: list[TopKPass]) -> None:
        """Move the parameters along the gradients of `backward` and count which latents fired."""
        schedule = adam_schedule(self.step + 1, self.lr(), *_BETAS)
        for at, value in enumerate(schedule):
            self._schedule[at] = value
        self.step += 1
        if self._graphed is not None:
            self._graphed.replay()
        else:
            self.apply(passes)

    def apply(self, passes: list[TopKPass]) -> None:
        """The part of `update` that the device does; what the host decides stands in tensors."""
        if self._steps_from_entries(passes):
            counts = self._move_from_entries(passes[0])
        else:
            counts = self._move_along_gradients(passes)
        rows = sum(len(done.x) for done in passes)
        silent = self.tokens_since_fired + rows
        self.tokens_since_fired.copy_(torch.where(counts > 0, 0, silent))
        self._log[0] += sum(done.squared_error for done in passes)
        self._log[1] += sum(done.squared_deviation for done in passes)
        self._log[2] += counts.sum()
        self._log[3] += rows

    def _steps_from_entries(self, passes: list[TopKPass]) -> bool:
        """Whether no gradient has to be known as a whole before the parameters move."""
        whole = self.device.type == "cpu" and len(passes) == 1 and self.config.clip_norm is None
        return whole and not self.shadows and self.config.moments == "float32"

    def _move_from_entries(self, done: TopKPass) -> Tensor:
        """Each row's gradient is summed and used at once; returns how often each latent fired."""
        aux = done.aux
        ids = None if aux is None else aux.ids
        beta1, beta2 = _BETAS
        step = partial(
            adam_sparse_rows_, latent_indices=done.latent_indices, order=done.order,
            factor=done.factor, extra_ids=ids, schedule=self._schedule, beta1=beta1, beta2=beta2,
            eps=_EPS,
        )  # fmt: skip
        _, counts = step(
            *self._state("W_dec"), weights=done.latent_acts, rows=done.error, unit_rows=True,
            extra=None if aux is None else aux.W_dec,
        )  # fmt: skip
        b_enc, _ = step(
            *self._state("W_enc_rows"), weights=done.pre_grads, rows=done.x,
            extra=None if aux is None else aux.W_enc_rows,
        )  # fmt: skip
        if aux is not None:
            b_enc[aux.ids] += aux.b_enc
        for name, grad in (("b_enc", b_enc), ("b_dec", done.error.sum(dim=0) * done.factor)):
            self._adam(name, grad)
        return counts

    def _move_along_gradients(self, passes: list[TopKPass]) -> Tensor:
        """Sum the gradients of all passes, clip them, step; returns how often each latent fired."""
        rows = sum(len(done.x) for done in passes)
        grads: dict[str, Tensor] = {}
        counts = torch.zeros_like(self.tokens_since_fired)
        for done in passes:
            # Each pass is a mean over its own rows.
            share = len(done.x) / rows
            own, fired = gradients(done, self.variant.d_sae)
            counts += fired
            for name, grad in own.items():
                if name in grads:
                    grads[name].add_(grad, alpha=share)
                else:
                    grads[name] = grad.mul_(share) if share < 1 else grad
        loss = torch.stack([done.total for done in passes]).sum()
        self._failed |= ~torch.isfinite(loss)
        scale = torch.ones_like(loss)
        if self.config.clip_norm is not None:
            norm = torch.stack([torch.linalg.vector_norm(g) for g in grads.values()]).norm()
            scale = (self.config.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        scale = scale.masked_fill(self._failed, torch.nan)  # NaN: the step is left out
        for name, grad in grads.items():
            self._adam(name, grad, scale)
        return counts

    def _state(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        return getattr(self.parameters, name), self.exp_avg[name], self.exp_avg_sq[name]

    def _adam(self, name: str, grad: Tensor, scale: Tensor | None = None) -> None:
        param, exp_avg, exp_avg_sq = self._state(name)
        beta1, beta2 = _BETAS
        adam_rows_(
            param, grad, exp_avg, exp_avg_sq, schedule=self._schedule, beta1=beta1, beta2=beta2,
            eps=_EPS, unit_rows=name == "W_dec", grad_scale=scale, shadow=self.shadows.get(name),
        )  # fmt: skip

    def _dead_latents(self) -> tuple[Tensor | None, Tensor | None]:
        """Numbers of the dead latents, and which of them only fill the list.

        On a GPU the list has a length that the host set at the last log line: the number of dead
        latents then, with room to double. The longest silent stand in it first.
        """
        length = self.dead_list_length()
        if length is None:
            return None, None
        if self.device.type == "cpu":
            return self.dead.nonzero()[:, 0], None
        ids = self.tokens_since_fired.topk(length).indices
        return ids, ~self.dead[ids]

    def _set_dead_capacity(self) -> None:
        wanted = 2 * int(self.dead.sum()) + 64
        self._dead_capacity = min(self.variant.d_sae, 1 << (wanted - 1).bit_length())

    def check_finite(self) -> None:
        """Raise NonFiniteError when a step since the last log line was left out for its loss.

        Waits for a GPU. A state saved after such a step would lack it, and say nothing of it.
        """
        if bool(self._failed):
            raise self._not_finite()

    def _not_finite(self) -> NonFiniteError:
        return NonFiniteError(
            f"the loss of {self.variant.folder} is not finite at step {self.step}: the last state "
            f"before it was kept; lower `lr` (now {self.peak_lr:.2g}) or look at the data there"
        )

    def take_log(self) -> dict[str, float]:
        """FVU, L0 and the dead fraction of the batches since the last call.

        The one place where the host waits for a GPU. Raises NonFiniteError when a loss since then
        was not finite: the parameters are those of the step before it.
        """
        dead = self.dead.sum()
        error, deviation, active, rows, n_dead, failed = torch.stack(
            [*self._log, dead.double(), self._failed.double()]
        ).tolist()
        if failed:
            raise self._not_finite()
        if self._dead_capacity:
            self._set_dead_capacity()
        self._log.zero_()
        return {
            "fvu": error / max(deviation, 1e-30),
            "l0": active / max(rows, 1),
            "dead_fraction": n_dead / self.variant.d_sae,
            "lr": self.lr() if self.step < self.config.steps else 0.0,
        }

    def spec(self, facts: dict[str, Any]) -> SAESpec:
        """What the SAE is called and computes, in canonical form, as trained so far."""
        layer, site = self.variant.place
        return SAESpec(
            architecture="topk",
            d_model=len(self.scale.mean),
            d_sae=self.variant.d_sae,
            k=self.variant.k,
            hook_name=hook_name_for(layer, site.replace("{layer}", str(layer))),
            hf_hook_name=facts["hf_hook_names"].get(self.variant.place, ""),
            model_name=facts["model"].get("name", ""),
            metadata={
                "context_size": facts["context"],
                "prepend_bos": facts["prepend_bos"],
                "saesteer": {
                    "model": facts["model"],
                    "layer": layer,
                    "site": site,
                    "tokens": self.step * self.config.batch_tokens,
                    "text": facts["text"],
                    "input_scale": self.scale.factor,
                },
            },
        )

    def save(self, folder: Path, facts: dict[str, Any]) -> str:
        """Write the SAE in canonical form; returns the SHA-256 of its weights."""
        return save_sae(folder, self.spec(facts), **canonical(self.parameters, self.scale))

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"param.{n}": p for n, p in self.parameters.named().items()}
        state |= {f"exp_avg.{n}": t for n, t in self.exp_avg.items()}
        state |= {f"exp_avg_sq.{n}": t for n, t in self.exp_avg_sq.items()}
        state["tokens_since_fired"] = self.tokens_since_fired
        state["step"] = torch.tensor(self.step)
        state["dead_capacity"] = torch.tensor(self._dead_capacity)
        state["log"] = self._log
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.named().items():
            parameter.copy_(state[f"param.{name}"])
            self.exp_avg[name].copy_(state[f"exp_avg.{name}"])
            self.exp_avg_sq[name].copy_(state[f"exp_avg_sq.{name}"])
        for name, shadow in self.shadows.items():
            shadow.copy_(getattr(self.parameters, name))
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
        self.step = int(state["step"])
        self._dead_capacity = int(state["dead_capacity"])
        self._log.copy_(state["log"])
