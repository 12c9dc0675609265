"""Which settings fit a number of processes."""

from collections.abc import Sequence

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.config import TrainConfig


def check_mesh(config: TrainConfig, d_saes: Sequence[int], world: int) -> None:
    """Raise UsageError where batches or latents cannot be shared out equally."""
    parts = config.latent_shards
    if world % parts:
        raise UsageError(
            f"`latent_shards` must divide the number of processes ({world}), got {parts}: start "
            "more with torchrun"
        )
    rows = world // parts
    for name in ("batch_tokens", "micro_batch_tokens"):
        value = getattr(config, name)
        if value is not None and (value % rows or value // rows < 2):
            raise UsageError(
                f"`{name}` is of all processes together: a multiple of the {rows} that share "
                f"batches out is needed, and two rows each; got {value}"
            )
    for d_sae in d_saes:
        if d_sae % world:
            raise UsageError(
                f"`d_sae` must be a multiple of the {world} processes, which share the latents' "
                f"rows out, got {d_sae}"
            )
    if config.cuda_graph and world > 1:
        raise UsageError("`cuda_graph` records the step of one process: leave it out")
