"""The search for the n-th largest, and the parts that processes have, without other processes."""

import pytest
import torch

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.config import TrainConfig
from saesteer.sae.training.architectures.topk import TopK, _unit_rows
from saesteer.sae.training.mesh.across import ALONE, Across
from saesteer.sae.training.mesh.choice import nth_largest, of_batch, of_examples
from saesteer.sae.training.mesh.limits import check_mesh


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nth_largest(dtype: torch.dtype) -> None:
    values = torch.rand(999, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 1e3
    values[5:9] = values[4]  # equal ones count each
    ranked = values.sort(descending=True).values
    for count in (1, 2, 500, 999):
        assert nth_largest(values, count, ALONE) == ranked[count - 1]
    assert nth_largest(values, 1000, ALONE) == 0


def test_of_batch_asks_again_when_an_offer_was_too_small() -> None:
    """All of the largest lie in a few examples; exactly as many as wanted are kept."""
    dense = torch.rand(6, 40, generator=torch.Generator().manual_seed(1))
    asked = []

    def encode(k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        asked.append(k)
        places = dense.flatten().topk(6 * k).indices.sort().values
        starts = torch.searchsorted(places, torch.arange(7) * 40)
        return dense.flatten()[places], places % 40, starts

    acts, latents, starts = of_batch(encode, 100, most=40, mean=2.0, across=ALONE)
    assert len(asked) > 1 and asked[-1] * 6 >= 100
    assert len(acts) == 100 == int(starts[-1])
    assert acts.min() == dense.flatten().sort(descending=True).values[99]
    examples = torch.arange(6).repeat_interleave(starts.diff())
    assert torch.equal(dense[examples, latents], acts)


def test_of_examples_alone_keeps_its_own() -> None:
    acts = torch.tensor([[3.0, 0.0, -5.0, 1.0], [0.0, 2.0, 2.0, 2.0]])
    kept, latents, starts = of_examples(acts, torch.arange(4).repeat(2, 1), 2, ALONE)
    # Of equal ones the first; an entry of 0 is none.
    assert kept.tolist() == [3.0, -5.0, 2.0, 2.0]
    assert latents.tolist() == [0, 2, 1, 2] and starts.tolist() == [0, 2, 4]


@pytest.mark.parametrize(("rows", "width"), [(64, 8), (9000, 3), (8200, 5)])
def test_a_part_is_drawn_as_it_is_of_all(rows: int, width: int) -> None:
    """To the bit, whatever is drawn before and after it."""
    whole_rng, part_rng = (torch.Generator().manual_seed(7) for _ in range(2))
    whole = _unit_rows(rows, width, whole_rng)
    part = slice(rows // 4, rows // 2)
    assert torch.equal(_unit_rows(rows, width, part_rng, part), whole[part])
    assert torch.equal(whole_rng.get_state(), part_rng.get_state())
    made = TopK(2).initialise(width, width, rows, 7, torch.device("cpu"), part)
    assert torch.equal(made["W_dec"], whole[part]) and len(made["b_enc"]) == rows // 2 - rows // 4


class Second(Across):
    """The second of four shards."""

    latent_parts, latent_part = 4, 1


def test_prefixes_of_a_shard() -> None:
    assert Second().own_latents(32) == slice(8, 16)
    assert Second().own_ends((3, 10, 12, 32), 8) == (0, 2, 4, 8)


@pytest.mark.parametrize(
    ("settings", "world", "says"),
    [
        ({"latent_shards": 2}, 1, "`latent_shards` must divide the number of processes (1), got 2"),
        ({"latent_shards": 3}, 4, "must divide the number of processes (4), got 3"),
        ({"batch_tokens": 66}, 4, "`batch_tokens` is of all processes together"),
        ({"micro_batch_tokens": 10}, 4, "`micro_batch_tokens` is of all processes together"),
        ({"cuda_graph": True}, 2, "`cuda_graph` records the step of one process"),
        ({}, 3, "`d_sae` must be a multiple of the 3 processes"),
    ],
)
def test_what_cannot_be_shared_out(settings: dict[str, int], world: int, says: str) -> None:
    config = TrainConfig(**{"batch_tokens": 192, **settings})  # type: ignore[arg-type]
    with pytest.raises(UsageError) as caught:
        check_mesh(config, [64], world)
    assert says in str(caught.value) and "\n" not in str(caught.value)
