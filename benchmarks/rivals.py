"""One optimiser step of a TopK SAE with other projects' own code.

A rival that is not installed raises ImportError. `dead` asks for the auxiliary loss with that many
dead latents: those that were silent longest after a few steps. Their counters are reset before
every step, so that each step has the same number of dead latents.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from types import ModuleType

import torch
from side_by_side import Contender
from torch import Tensor

PREPARATION_STEPS = 3
"""Steps after which the latents that were silent longest are marked as dead."""


@dataclass(frozen=True)
class Job:
    """The training step that every contender takes."""

    d_model: int
    d_sae: int
    k: int
    batches: Sequence[Tensor]
    """`[batch, d_model]` each, taken in turn."""
    dead: int = 0
    """Latents that count as dead, with the auxiliary loss on; 0: without it."""

    @property
    def batch(self) -> int:
        return len(self.batches[0])

    @property
    def device(self) -> torch.device:
        return self.batches[0].device

    @property
    def steps(self) -> int:
        """Length of the run, for learning rate schedules."""
        return 10_000

    def at(self, number: int) -> Tensor:
        """The batch of a step."""
        return self.batches[number % len(self.batches)]


def keep_dead(
    counter: Tensor, dead: int, dead_value: float, step: Callable[[int], object]
) -> Callable[[], object]:
    """Take a few steps, mark `dead` latents as dead; returns a function that marks them again."""
    if not dead:
        return lambda: None
    for number in range(PREPARATION_STEPS):
        step(number)
    silent = counter.argsort(descending=True, stable=True)[:dead]
    marked = torch.zeros_like(counter)
    marked[silent] = dead_value
    return lambda: counter.copy_(marked)


def sae_lens(job: Job, *, autocast: bool = False) -> Contender:
    """`SAETrainer.step` of SAELens: dense activations, torch.optim.Adam, gradient clipping."""
    from sae_lens import SAETrainingRunner  # noqa: F401  (imports the registry of architectures)
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    coefficient = 1.0 if job.dead else 0.0
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=job.d_model,
            d_sae=job.d_sae,
            k=job.k,
            aux_loss_coefficient=coefficient,
            device=str(job.device),
        )
    )
    config = SAETrainerConfig(
        total_training_samples=job.steps * job.batch,
        train_batch_size_samples=job.batch,
        device=str(job.device),
        lr_end=3e-5,
        autocast=autocast,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, sae, data_provider=iter(()))

    def step(number: int) -> None:
        trainer.step(job.at(number))

    counter = trainer.n_forward_passes_since_fired
    return Contender(
        step,
        f"sae-lens {version('sae-lens')}, float32{' under bfloat16 autocast' if autocast else ''}, "
        f"dense, Adam, clip 1.0, {_auxk(job, f'coefficient {coefficient:g}, k_aux d_model/2')}",
        keep_dead(counter, job.dead, config.dead_feature_window + 1, step),
    )


def dictionary_learning(job: Job) -> Contender:
    """`TopKTrainer.update` of dictionary_learning: dense, Adam, clipping, unit decoder rows."""
    trainer_class = dictionary_learning_module("top_k").TopKTrainer
    trainer = trainer_class(
        steps=job.steps,
        activation_dim=job.d_model,
        dict_size=job.d_sae,
        k=job.k,
        layer=0,
        lm_name="none",
        auxk_alpha=1 / 32 if job.dead else 0.0,
        device=str(job.device),
    )
    # Step 0 computes a geometric median of its batch, once in a run; that is not measured.
    trainer.update(0, job.at(0))

    def step(number: int) -> None:
        trainer.update(number + 1, job.at(number))

    return Contender(
        step,
        f"dictionary-learning {version('dictionary-learning')}, float32, dense, Adam, clip 1.0, "
        f"unit decoder rows, {_auxk(job, 'alpha 1/32, k_aux d_model/2')}",
        keep_dead(
            trainer.num_tokens_since_fired, job.dead, trainer.dead_feature_threshold * 2, step
        ),
    )


def dictionary_learning_module(trainer: str) -> ModuleType:
    """One of its trainer modules, imported without running the package's `__init__`.

    That imports its activation buffer and with it an old nnsight, torchvision and diffusers, none
    of which a training step needs. The modules below it are imported unchanged.
    """
    name = "dictionary_learning"
    if name not in sys.modules:
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {name!r}")
        sys.modules[name] = importlib.util.module_from_spec(spec)  # found, not executed
    return importlib.import_module(f"{name}.trainers.{trainer}")


def sparsify(job: Job) -> Contender:
    """What `sparsify.Trainer.fit` does with one coder and `optimizer="adam"` in a step.

    The trainer itself owns the language model and the data, so its step is repeated here in the
    same order, with the coder's own methods.
    """
    if job.device.type == "cpu":
        # Its Triton decoder is chosen wherever triton can be imported, and fails on a CPU.
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig
    from transformers import get_linear_schedule_with_warmup

    config = SparseCoderConfig(num_latents=job.d_sae, k=job.k)
    coder = SparseCoder(job.d_model, config, job.device, dtype=torch.float32)
    coder.b_dec.data = job.at(0).mean(0)
    adam = torch.optim.Adam(coder.parameters(), lr=2e-4 / (job.d_sae / 2**14) ** 0.5)
    schedule = get_linear_schedule_with_warmup(adam, 1000, job.steps)
    silent_for = torch.zeros(job.d_sae, dtype=torch.long, device=job.device)
    did_fire = torch.zeros(job.d_sae, dtype=torch.bool, device=job.device)
    threshold, alpha = 10_000_000, 1 / 32 if job.dead else 0.0

    def step(number: int) -> None:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")  # as `fit` does
        x = job.at(number)
        coder.set_decoder_norm_to_unit_norm()
        dead_mask = silent_for > threshold if alpha else None
        total_variance = (x - x.mean(0)).pow(2).sum()
        out = coder(x=x, y=x, dead_mask=dead_mask, total_variance=total_variance)
        did_fire[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        if alpha:
            float(out.auxk_loss.detach())
        (out.fvu + alpha * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()
        schedule.step()
        silent_for.add_(len(x))
        silent_for[did_fire] = 0
        did_fire.zero_()
        torch.set_float32_matmul_precision(precision)

    decoder = "embedding_bag decode" if job.device.type == "cpu" else "its Triton decode, bfloat16"
    return Contender(
        step,
        f"eai-sparsify {version('eai-sparsify')}, float32, {decoder}, torch.optim.Adam, "
        f"unit decoder rows, {_auxk(job, 'alpha 1/32, k_aux d_model/2')}",
        keep_dead(silent_for, job.dead, 2 * threshold, step),
    )


def _auxk(job: Job, options: str) -> str:
    return f"AuxK {options}, {job.dead:,} dead" if job.dead else "AuxK off"
