"""One SAE in training: its parameters, its optimiser state, and one step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saesteer.checkpoints.errors import NonFiniteError
from saesteer.checkpoints.sae_file import SAESpec, hook_name_for, save_sae
from saesteer.checkpoints.shards import folder_name
from saesteer.kernels.ops import adam_rows_
from saesteer.sae.config import TrainConfig, default_lr
from saesteer.sae.topk import InputScale, TopKLoss, canonical, initialise, topk_loss

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
    """The parameters of one SAE, its optimiser state, and one step of training."""

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
        d_model = len(scale.mean)
        self.parameters = initialise(d_model, variant.d_sae, variant.init_seed, device)
        named = self.parameters.named()
        self.exp_avg = {name: torch.zeros_like(p.detach()) for name, p in named.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p.detach()) for name, p in named.items()}
        self.tokens_since_fired = torch.zeros(variant.d_sae, dtype=torch.int64, device=device)
        self.step = 0
        self.peak_lr = config.lr or default_lr(variant.d_sae, config.steps)
        self.device = device
        self._start_log()

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

    def backward(self, batch: Float[Tensor, "batch width"]) -> TopKLoss:
        """Loss and gradients of one batch. Nothing moves.

        Raises NonFiniteError when the loss is NaN or infinite.
        """
        rows = batch[:, self.columns].to(self.device)
        x = self.scale.apply(rows)
        loss = topk_loss(self.parameters, x, self.variant.k, self.dead, self.config.auxk)
        if not torch.isfinite(loss.total):
            raise NonFiniteError(
                f"the loss of {self.variant.folder} is not finite at step {self.step}: the state "
                f"before it was kept; lower --lr (now {self.peak_lr:.2g}) or look at the data there"
            )
        torch.autograd.backward(loss.total)
        return loss

    def update(self, loss: TopKLoss) -> None:
        """Move the parameters along the gradients of `backward` and count which latents fired."""
        lr = self.lr()
        self.step += 1
        for name, parameter in self.parameters.named().items():
            assert parameter.grad is not None, "update follows backward"
            adam_rows_(
                parameter.detach(),
                parameter.grad,
                self.exp_avg[name],
                self.exp_avg_sq[name],
                step=self.step,
                lr=lr,
                beta1=_BETAS[0],
                beta2=_BETAS[1],
                eps=_EPS,
                unit_rows=name == "W_dec",
            )
            parameter.grad = None
        self._log_batch(loss)
        self.tokens_since_fired += len(loss.latent_acts)
        self.tokens_since_fired[loss.latent_indices[loss.latent_acts > 0]] = 0

    def _start_log(self) -> None:
        self._error = self._variance = self._active = 0.0
        self._rows = 0

    def _log_batch(self, loss: TopKLoss) -> None:
        self._error += loss.squared_error.item()
        self._variance += loss.squared_deviation.item()
        self._active += (loss.latent_acts > 0).sum().item()
        self._rows += len(loss.latent_acts)

    def take_log(self) -> dict[str, float]:
        """FVU, L0 and the dead fraction of the batches since the last call."""
        log = {
            "fvu": self._error / max(self._variance, 1e-30),
            "l0": self._active / max(self._rows, 1),
            "dead_fraction": self.dead.float().mean().item(),
            "lr": self.lr() if self.step < self.config.steps else 0.0,
        }
        self._start_log()
        return log

    def save(self, folder: Path, facts: dict[str, Any]) -> str:
        """Write the SAE in canonical form; returns the SHA-256 of its weights."""
        layer, site = self.variant.place
        tensors = canonical(self.parameters, self.scale)
        spec = SAESpec(
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
                    "tokens": self.config.steps * self.config.batch_tokens,
                    "text": facts["text"],
                    "input_scale": self.scale.factor,
                },
            },
        )
        return save_sae(folder, spec, **tensors)

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"param.{n}": p.detach() for n, p in self.parameters.named().items()}
        state |= {f"exp_avg.{n}": t for n, t in self.exp_avg.items()}
        state |= {f"exp_avg_sq.{n}": t for n, t in self.exp_avg_sq.items()}
        state["tokens_since_fired"] = self.tokens_since_fired
        state["step"] = torch.tensor(self.step)
        log = [self._error, self._variance, self._active, float(self._rows)]
        state["log"] = torch.tensor(log, dtype=torch.float64)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.named().items():
            parameter.detach().copy_(state[f"param.{name}"])
            self.exp_avg[name].copy_(state[f"exp_avg.{name}"])
            self.exp_avg_sq[name].copy_(state[f"exp_avg_sq.{name}"])
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
        self.step = int(state["step"])
        self._error, self._variance, self._active, rows = state["log"].tolist()
        self._rows = int(rows)
