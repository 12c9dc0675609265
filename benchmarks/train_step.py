"""One TopK optimiser step: saesteer, SAELens, and the encoder product alone, in one process.

    python benchmarks/train_step.py                      # d_model 576, d_sae 9216, k 32, batch 2048
    python benchmarks/train_step.py --d-sae 4608 --rounds 9

The contenders take turns, round by round, so that a machine whose speed drifts slows all of them;
what to quote is the ratio of medians. SAELens runs as its authors ship it (dense activations,
float32, torch.optim.Adam). AuxK is off for both: no latent is dead in so few steps. Absolute
figures mean nothing on another machine.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch

from saesteer.kernels.ops import encode_topk
from saesteer.sae.config import TrainConfig
from saesteer.sae.topk import InputScale
from saesteer.sae.trainer import SAETrainer, Variant


def ours(d_model: int, d_sae: int, k: int, batch: int) -> Callable[[torch.Tensor], None]:
    config = TrainConfig(d_sae=(d_sae,), k=(k,), tokens=10_000 * batch, batch_tokens=batch, auxk=0)
    scale = InputScale(torch.zeros(d_model, dtype=torch.float64), 1.0)
    trainer = SAETrainer(
        Variant((0, "resid_post"), d_sae, k, 0), config, slice(0, d_model), scale, _device()
    )

    def step(x: torch.Tensor) -> None:
        trainer.update(trainer.backward(x))

    return step


def sae_lens(d_model: int, d_sae: int, k: int, batch: int) -> Callable[[torch.Tensor], None]:
    from sae_lens import SAETrainingRunner  # noqa: F401  (imports the registry of architectures)
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer as LensTrainer

    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=d_model, d_sae=d_sae, k=k, aux_loss_coefficient=0.0, device=str(_device())
        )
    )
    config = SAETrainerConfig(
        total_training_samples=10_000 * batch,
        train_batch_size_samples=batch,
        device=str(_device()),
        lr_end=3e-5,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = LensTrainer(config, sae, data_provider=iter(()))

    def step(x: torch.Tensor) -> None:
        trainer.step(x)

    return step


def product(d_model: int, d_sae: int, k: int, batch: int) -> Callable[[torch.Tensor], None]:
    W_enc = torch.randn(d_model, d_sae, device=_device())
    out = torch.empty(batch, d_sae, device=_device())

    def step(x: torch.Tensor) -> None:
        torch.mm(x, W_enc, out=out)

    return step


def encode(d_model: int, d_sae: int, k: int, batch: int) -> Callable[[torch.Tensor], None]:
    W_enc, b_enc = torch.randn(d_sae, d_model, device=_device()), torch.zeros(d_sae)

    def step(x: torch.Tensor) -> None:
        encode_topk(x, W_enc, b_enc.to(x.device), k)

    return step


CONTENDERS = {
    "saesteer step": ours,
    "SAELens SAETrainer.step": sae_lens,
    "x @ W_enc alone": product,
    "encode_topk alone": encode,
}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d-model", type=int, default=576)
    parser.add_argument("--d-sae", type=int, default=9216)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    shape = (args.d_model, args.d_sae, args.k, args.batch)
    torch.manual_seed(0)
    # Sparse combinations of fixed directions, so that latents differ in how often they are used.
    features = torch.randn(4 * args.d_model, args.d_model)
    weights = torch.rand(args.batch, len(features)).pow(20)
    x = (weights @ features).to(_device())
    steps = {name: make(*shape) for name, make in CONTENDERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.rounds + 2):
        for name, step in steps.items():
            _synchronise()
            started = time.perf_counter()
            step(x)
            _synchronise()
            if number >= 2:  # two rounds to warm up
                seconds[name].append(time.perf_counter() - started)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    rows = {
        name: {
            "tokens_per_second": args.batch / median[name],
            "slowest_over_fastest": max(times) / min(times),
            "saesteer_is_times_as_fast": median[name] / median["saesteer step"],
        }
        for name, times in seconds.items()
    }
    facts = {
        "d_model, d_sae, k, batch": shape,
        "rounds": args.rounds,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }
    if args.json:
        print(json.dumps({**facts, "results": rows}, indent=2))
        return
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(f"{'':26}{'tokens/s':>10}{'spread':>9}{'saesteer is':>14}")
    for name, row in rows.items():
        print(
            f"{name:26}{row['tokens_per_second']:>10,.0f}{row['slowest_over_fastest']:>8.2f}x"
            f"{row['saesteer_is_times_as_fast']:>12.2f} x"
        )


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
