"""Adam on the parameters of one SAE: moments, learning rate, and the two ways to move.

Where no step needs the whole gradient, each row of a matrix is moved as soon as its gradient is
summed from its entries. For clipping, accumulation and on a GPU, whole gradients are made first.
"""

from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saesteer.kernels.ops import adam_rows_, adam_schedule, adam_sparse_rows_
from saesteer.sae.config import TrainConfig
from saesteer.sae.training.architecture import Architecture, Parameters, Pass, gradients

_BETA2 = 0.999
# With the loss of order 1 the gradients of single rows are tiny: Gao et al. use this epsilon.
_EPS = 6.25e-10


class Optimiser:
    """Moves parameters in place. Whatever changes from step to step is in tensors."""

    def __init__(
        self,
        architecture: Architecture,
        parameters: Parameters,
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        self.architecture = architecture
        self.parameters = parameters
        self.config = config
        self.device = device
        self._betas = (config.beta1, _BETA2)
        moments = torch.bfloat16 if config.moments == "bfloat16" else torch.float32
        self.exp_avg: Parameters = {}
        self.exp_avg_sq: Parameters = {}
        for name, parameter in parameters.items():
            # A vector is too small to be worth rounding.
            dtype = moments if parameter.dim() == 2 else torch.float32
            self.exp_avg[name] = torch.zeros_like(parameter, dtype=dtype)
            self.exp_avg_sq[name] = torch.zeros_like(parameter, dtype=dtype)
        self.copies = self._make_copies()
        """bfloat16 copies of the matrices, for the products; empty with float32 products."""
        # A rate of 0 until the first step, because recording a CUDA graph takes steps before it.
        self._schedule = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64, device=device)
        self._own_schedules = {name: self._schedule.clone() for name in architecture.lr_factors}
        self.failed = torch.zeros((), dtype=torch.bool, device=device)
        """Set on the device once a loss is not finite; from then on no step moves anything."""

    def _make_copies(self) -> Parameters:
        products = self.config.dtype
        if products == "auto":
            products = "bfloat16" if self.device.type == "cuda" else "float32"
        if products == "float32":
            return {}
        return {name: p.bfloat16() for name, p in self.parameters.items() if p.dim() == 2}

    @property
    def in_products(self) -> Parameters:
        """The parameters for products: bfloat16 copies where there are any."""
        return {**self.parameters, **self.copies}

    @property
    def whole(self) -> Parameters:
        """All rows of the latents that this process has, as passes take them."""
        return self.parameters

    def in_float32(self) -> Parameters:
        """All rows of the latents that this process has, unrounded."""
        return self.parameters

    def gathered(self) -> dict[str, Tensor]:
        """The state of all processes, on the one that writes it."""
        return self.state_dict()

    def gathered_parameters(self) -> Parameters:
        """The parameters of all processes, on the one that writes them."""
        return self.parameters

    def refresh_copies(self) -> None:
        """Update the copies after parameters were set from outside."""
        for name, copy in self.copies.items():
            copy.copy_(self.parameters[name])

    def set_parameter(self, name: str, values: Tensor) -> None:
        """Set a parameter from outside, and its copy."""
        self.parameters[name].copy_(values)
        self.refresh_copies()

    def set_step(self, step: int, lr: float) -> None:
        """Write the number of the next step (from 1) and its learning rate to the device."""
        for at, value in enumerate(adam_schedule(step, lr, *self._betas)):
            self._schedule[at] = value
        for name, schedule in self._own_schedules.items():
            own = adam_schedule(step, lr * self.architecture.lr_factors[name], *self._betas)
            for at, value in enumerate(own):
                schedule[at] = value

    def move(self, passes: list[Pass]) -> Int[Tensor, " d_sae"]:
        """One step along the gradients of the passes; returns how often each latent fired."""
        if self._row_by_row(passes):
            counts = self._move_from_entries(passes[0])
        else:
            counts = self._move_along_gradients(passes)
        self.architecture.after_step(self.parameters)
        return counts

    def _row_by_row(self, passes: list[Pass]) -> bool:
        """Whether the parameters can be moved row by row, without a whole gradient."""
        config = self.config
        plain = self.device.type == "cpu" and config.clip_norm is None
        plain = plain and not self.copies and config.moments == "float32"
        return plain and len(passes) == 1 and passes[0].only_entries

    def _move_from_entries(self, sae_pass: Pass) -> Int[Tensor, " d_sae"]:
        """Each row's gradient is summed and used at once."""
        compact = sae_pass.compact
        beta1, beta2 = self._betas
        step = partial(
            adam_sparse_rows_,
            latent_indices=sae_pass.latent_indices,
            order=sae_pass.order,
            row_starts=sae_pass.row_starts,
            factor=sae_pass.factor,
            extra_ids=None if compact is None else compact.ids,
            schedule=self._schedule,
            beta1=beta1,
            beta2=beta2,
            eps=_EPS,
        )
        unit_rows = self.architecture.unit_rows
        _, counts = step(
            *self._state("W_dec"),
            weights=sae_pass.decoder.weights,
            rows=sae_pass.decoder.rows,
            unit_rows="W_dec" in unit_rows,
            extra=None if compact is None else compact.W_dec,
        )
        b_enc, _ = step(
            *self._state("W_enc_rows"),
            weights=sae_pass.encoder.weights,
            rows=sae_pass.encoder.rows,
            unit_rows="W_enc_rows" in unit_rows,
            extra=None if compact is None else compact.W_enc_rows,
        )
        if compact is not None:
            b_enc[compact.ids] += compact.b_enc
        grads = {**sae_pass.dense, "b_enc": b_enc}
        if "b_enc" in sae_pass.dense:
            b_enc += sae_pass.dense["b_enc"]
        for name, grad in grads.items():
            self._adam(name, grad)
        return counts

    def _move_along_gradients(self, passes: list[Pass]) -> Int[Tensor, " d_sae"]:
        """Sum the gradients of all passes, clip them, step."""
        rows = sum(sae_pass.examples for sae_pass in passes)
        d_sae = len(self.whole["W_dec"])
        grads: dict[str, Tensor] = {}
        counts = torch.zeros(d_sae, dtype=torch.int64, device=self.device)
        for sae_pass in passes:
            # The loss of each pass is a mean over its own rows.
            share = sae_pass.examples / rows
            pass_grads, fired = gradients(sae_pass, d_sae)
            counts += fired
            for name, grad in pass_grads.items():
                if name in grads:
                    grads[name].add_(grad, alpha=share)
                else:
                    grads[name] = grad.mul_(share) if share < 1 else grad
        loss = torch.stack([sae_pass.loss for sae_pass in passes]).sum()
        grads, counts, loss = self._of_all(grads, counts, loss)
        self.failed |= ~torch.isfinite(loss)
        scale = torch.ones_like(loss)
        if self.config.clip_norm is not None:
            scale = (self.config.clip_norm / (self._norm(grads) + 1e-6)).clamp(max=1.0)
        scale = scale.masked_fill(self.failed, torch.nan)  # NaN: the step is left out
        for name, grad in grads.items():
            self._adam(name, grad, scale)
        return counts

    def _of_all(
        self, grads: dict[str, Tensor], counts: Tensor, loss: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The same of all processes; here of one."""
        return grads, counts, loss

    def _norm(self, grads: dict[str, Tensor]) -> Float[Tensor, ""]:
        """Norm of all gradients together."""
        norms = torch.stack([torch.linalg.vector_norm(g) for g in grads.values()])
        norm: Tensor = torch.linalg.vector_norm(norms)
        return norm

    def _state(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        return self.parameters[name], self.exp_avg[name], self.exp_avg_sq[name]

    def _adam(self, name: str, grad: Tensor, scale: Tensor | None = None) -> None:
        param, exp_avg, exp_avg_sq = self._state(name)
        beta1, beta2 = self._betas
        adam_rows_(
            param,
            grad,
            exp_avg,
            exp_avg_sq,
            schedule=self._own_schedules.get(name, self._schedule),
            beta1=beta1,
            beta2=beta2,
            eps=_EPS,
            unit_rows=name in self.architecture.unit_rows,
            grad_scale=scale,
            shadow=self.copies.get(name),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and moments, which share memory with those of this object."""
        groups = {"param": self.parameters, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {
            f"{group}.{name}": tensor
            for group, tensors in groups.items()
            for name, tensor in tensors.items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a state into the parameters and moments, and update the bfloat16 copies."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])
        self.refresh_copies()
