"""Training runs in another project's own trainer, in the environment that it needs.

    python benchmarks/quality_rivals.py JOB.json ...

A job (see `quality.py`, which writes it) names the tool, the architecture, its settings and a
file of rows. Rows and their order are the same for every tool. Written beside the job: `sae.pt`
with the SAE in one form, f = act((x - input_bias b_dec) W_enc + b_enc), x^ = f W_dec + b_dec; the
same SAE at a few points of the run; and `done.json` with the seconds that steps took, after one
step of a trainer that is thrown away, in which code may be compiled. Nothing of
saesteer is imported here.

Everyone warms up over the first 5 % and decays to zero over the last 20 % of the run: the tools'
own 1,000 steps of warm-up would be longer than the run. A latent is dead after a quarter of it.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rivals import dictionary_learning_module
from side_by_side import leave_folder
from torch import Tensor

SNAPSHOTS = 8
SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
"""Sizes of Matryoshka's groups; the last takes what rounding leaves."""

Step = Callable[[Tensor], object]
Export = Callable[[], dict[str, Tensor]]


def group_sizes(d_sae: int) -> list[int]:
    """Latents of each group of a Matryoshka SAE."""
    sizes = [max(1, round(share * d_sae)) for share in SHARES[:-1]]
    return [*sizes, d_sae - sum(sizes)]


def batches(rows: Tensor, steps: int, batch: int, seed: int) -> Iterator[Tensor]:
    """`steps` batches in float32; every epoch in a new order of the seed's."""
    rng = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(len(rows), generator=rng)])
        yield rows[order[:batch]].float()
        order = order[batch:]


def schedule(step: int, steps: int) -> float:
    """Share of the peak rate at a step: linear warm-up over 5 %, linear decay over 20 %."""
    rising = (step + 1) / max(1, round(0.05 * steps))
    falling = (steps - step) / max(1, round(0.2 * steps))
    return min(1.0, rising, falling)


def sae_lens(job: dict[str, Any], first: Tensor) -> tuple[Step, Export, str]:
    """`SAETrainer.step` of SAELens with its training classes."""
    from sae_lens import SAETrainingRunner  # noqa: F401  (imports the registry of architectures)
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    classes = {
        "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
        "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
        "matryoshka": (MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig),
    }
    sae_class, config_class = classes[job["arch"]]
    more: dict[str, Any] = {}
    if job["arch"] == "matryoshka":
        sizes = group_sizes(job["d_sae"])
        more["matryoshka_widths"] = [sum(sizes[: at + 1]) for at in range(len(sizes))]
    sae = sae_class(config_class(d_in=first.shape[1], d_sae=job["d_sae"], k=job["k"], **more))
    steps, batch = job["steps"], job["batch"]
    lr = job["lr"] or SAETrainerConfig.lr
    config = SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        lr=lr,
        lr_warm_up_steps=max(1, round(0.05 * steps)),
        lr_decay_steps=round(0.2 * steps),
        lr_end=1e-9,
        dead_feature_window=max(1, steps // 4),
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(config, sae, data_provider=iter(()))

    def export() -> dict[str, Tensor]:
        # It chooses by the activation times the decoder row's length and decodes with unit rows.
        norms = sae.W_dec.norm(dim=1)
        return {
            "W_enc": sae.W_enc * norms,
            "b_enc": sae.b_enc * norms,
            "W_dec": sae.W_dec / norms[:, None],
            "b_dec": sae.b_dec,
            "threshold": torch.as_tensor(getattr(sae, "topk_threshold", 0.0)),
            "input_bias": torch.tensor(bool(sae.cfg.apply_b_dec_to_input)),
        }

    given = f"lr {lr:.3g}, Adam, clip 1.0, AuxK coefficient 1"
    return trainer.step, export, given


def dictionary_learning(job: dict[str, Any], first: Tensor) -> tuple[Step, Export, str]:
    """`update` of dictionary_learning's trainers."""
    names = {
        "topk": ("top_k", "TopKTrainer"),
        "batchtopk": ("batch_top_k", "BatchTopKTrainer"),
        "matryoshka": ("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer"),
    }
    module, name = names[job["arch"]]
    steps = job["steps"]
    more: dict[str, Any] = {}
    if job["arch"] == "matryoshka":
        more["group_fractions"] = [size / job["d_sae"] for size in group_sizes(job["d_sae"])]
    trainer = getattr(dictionary_learning_module(module), name)(
        steps=steps,
        activation_dim=first.shape[1],
        dict_size=job["d_sae"],
        k=job["k"],
        layer=0,
        lm_name="none",
        lr=job["lr"],
        warmup_steps=max(1, round(0.05 * steps)),
        decay_start=round(0.8 * steps),
        seed=job["seed"],
        device="cpu",
        **more,
    )
    trainer.dead_feature_threshold = max(1, steps * job["batch"] // 4)
    if hasattr(trainer, "threshold_start_step"):
        trainer.threshold_start_step = min(1000, steps // 2)
    taken = iter(range(steps))
    ae = trainer.ae

    def export() -> dict[str, Tensor]:
        if job["arch"] == "matryoshka":
            W_enc, b_enc, W_dec = ae.W_enc, ae.b_enc, ae.W_dec
        else:
            W_enc, b_enc, W_dec = ae.encoder.weight.T, ae.encoder.bias, ae.decoder.weight.T
        return {
            "W_enc": W_enc,
            "b_enc": b_enc,
            "W_dec": W_dec,
            "b_dec": ae.b_dec,
            "threshold": torch.as_tensor(getattr(ae, "threshold", 0.0)).clamp(min=0),
            "input_bias": torch.tensor(True),
        }

    given = f"lr {trainer.lr:.3g}, Adam, clip 1.0, AuxK 1/32"
    return lambda x: trainer.update(next(taken), x), export, given


def sparsify(job: dict[str, Any], first: Tensor) -> tuple[Step, Export, str]:
    """What `sparsify.Trainer.fit` does in a step: with signum as shipped, or with Adam.

    The trainer owns the language model and the data, so its step is repeated here in the same
    order, with the coder's own methods.
    """
    # Its Triton decoder is chosen wherever triton can be imported, and fails on a CPU.
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig

    steps, width = job["steps"], job["d_sae"] / 2**14
    config = SparseCoderConfig(num_latents=job["d_sae"], k=job["k"])
    coder = SparseCoder(first.shape[1], config, "cpu", dtype=torch.float32)
    coder.b_dec.data = first.mean(0)
    signum = job["optimizer"] == "signum"
    lr = job["lr"] or (5e-3 if signum else 2e-4) / width**0.5
    if signum:
        from schedulefree import ScheduleFreeWrapper
        from sparsify.sign_sgd import SignSGD

        optimizer = ScheduleFreeWrapper(SignSGD(coder.parameters(), lr=lr), momentum=0.95)
        optimizer.train()
        plan = None
    else:
        optimizer = torch.optim.Adam(coder.parameters(), lr=lr)
        plan = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: schedule(at, steps))
    silent_for = torch.zeros(job["d_sae"], dtype=torch.long)
    dead_after = max(1, steps * job["batch"] // 4)
    alpha = 1 / 32

    def step(x: Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        dead = silent_for > dead_after
        total_variance = (x - x.mean(0)).pow(2).sum()
        out = coder(x=x, y=x, dead_mask=dead, total_variance=total_variance)
        (out.fvu + alpha * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        if plan is not None:
            plan.step()
        silent_for.add_(len(x))
        silent_for[out.latent_indices.flatten().unique()] = 0

    def export() -> dict[str, Tensor]:
        if signum:
            optimizer.eval()  # its weights in use are an average
        norms = coder.W_dec.norm(dim=1, keepdim=True)  # as the next step would make them
        found = {
            "W_enc": coder.encoder.weight.T,
            "b_enc": coder.encoder.bias,
            "W_dec": coder.W_dec / norms,
            "b_dec": coder.b_dec,
            "threshold": torch.tensor(0.0),
            "input_bias": torch.tensor(True),
        }
        found = {name: tensor.detach().clone() for name, tensor in found.items()}
        if signum:
            optimizer.train()
        return found

    what = "schedule-free signum" if signum else "Adam"
    return step, export, f"lr {lr:.3g}, {what}, AuxK 1/32"


TOOLS = {
    "sae_lens": (sae_lens, "sae-lens"),
    "dictionary_learning": (dictionary_learning, "dictionary-learning"),
    "sparsify": (sparsify, "eai-sparsify"),
}


def train(
    job: dict[str, Any], make: Callable[[dict[str, Any], Tensor], tuple[Step, Export, str]]
) -> dict[str, Any]:
    """Take all steps; keep the SAE at `SNAPSHOTS` points with the seconds until then."""
    torch.set_num_threads(job["threads"])
    rows = torch.load(job["rows"], mmap=True)
    steps, factor = job["steps"], job["factor"]
    stream = batches(rows, steps, job["batch"], job["seed"])
    first = next(batches(rows, 1, job["batch"], job["seed"])) * factor
    make(job, first)[0](first)
    torch.manual_seed(job["seed"])
    step, export, given = make(job, first)
    kept: list[dict[str, Tensor]] = []
    wall, cpu = [0.0], [0.0]
    at = {round(steps * (n + 1) / SNAPSHOTS) for n in range(SNAPSHOTS)}
    for number, batch in enumerate(stream, start=1):
        batch = batch * factor
        begun, used = time.perf_counter(), time.process_time()
        step(batch)
        wall.append(wall[-1] + time.perf_counter() - begun)
        cpu.append(cpu[-1] + time.process_time() - used)
        if number in at:
            snapshot = {name: tensor.detach().clone() for name, tensor in export().items()}
            kept.append({**snapshot, "step": torch.tensor(number)})
    folder = Path(job["folder"])
    torch.save(kept, folder / "sae.pt")
    return {
        "given": given,
        "wall": [wall[int(one["step"])] for one in kept],
        "cpu": [cpu[int(one["step"])] for one in kept],
    }


def main(paths: Sequence[str]) -> None:
    leave_folder()
    for path in paths:
        job = json.loads(Path(path).read_text())
        make, distribution = TOOLS[job["tool"]]
        finish(job, train(job, make), distribution)


def finish(job: dict[str, Any], done: dict[str, Any], distribution: str) -> None:
    """Write `done.json`, the sign of a run that is whole."""
    text = json.dumps(done | {"version": version(distribution)})
    (Path(job["folder"]) / "done.json").write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
