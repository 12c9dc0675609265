"""Top-p keeps what transformers' warper keeps, whether a few tokens hold the mass or all do."""

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from saesteer.sae.model import nucleus
from saesteer.sae.model.nucleus import Nucleus, keep_nucleus


def logits(vocabulary: int, sharpness: float, rows: int = 5) -> Tensor:
    rng = torch.Generator().manual_seed(vocabulary)
    return torch.randn(rows, vocabulary, generator=rng) * sharpness


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.95, 0.999])
@pytest.mark.parametrize(
    ("vocabulary", "sharpness"), [(7, 1.0), (1024, 1.0), (5003, 6.0), (5003, 0.1), (5003, 0.0)]
)
def test_it_is_what_the_library_gives(vocabulary: int, sharpness: float, top_p: float) -> None:
    scores = logits(vocabulary, sharpness)
    ids = torch.zeros(len(scores), 1, dtype=torch.int64)
    expected = TopPLogitsWarper(top_p)(ids, TemperatureLogitsWarper(0.7)(ids, scores))
    found = Nucleus(0.7, top_p)(ids, scores)
    differ = (found != expected).nonzero()
    # Its float32 sums run over the whole vocabulary: a token whose mass ends at top_p to the sixth
    # digit may fall on the other side. With equal scores any of them are as good.
    allowed = 1 if sharpness else vocabulary
    assert all(int((differ[:, 0] == row).sum()) <= allowed for row in range(len(scores)))
    kept, theirs = (found > -torch.inf).sum(dim=1), (expected > -torch.inf).sum(dim=1)
    assert ((kept - theirs).abs() <= 1).all() and (kept >= 1).all()
    both = (found > -torch.inf) & (expected > -torch.inf)
    if sharpness:
        assert torch.equal(found[both], expected[both])


def test_the_nucleus_is_the_smallest_that_holds_the_mass() -> None:
    scores = logits(3000, 5.0)
    for row, kept in zip(scores, keep_nucleus(scores, 0.9), strict=True):
        mass = row.double().softmax(dim=0)[kept > -torch.inf].sort().values
        assert mass.sum() >= 0.9 > mass[1:].sum()


def test_only_a_wide_nucleus_sorts_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_widths: list[int] = []
    sort = Tensor.sort

    def counted(self: Tensor, *args: object, **options: object) -> object:
        sorted_widths.append(self.shape[-1])
        return sort(self, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Tensor, "sort", counted)
    keep_nucleus(logits(5000, 6.0), 0.95)
    assert not sorted_widths
    wide = keep_nucleus(logits(5000, 0.1), 0.95)
    assert sorted_widths == [5000] and (wide[0] > -torch.inf).sum() > nucleus._CUT


def test_everything_is_kept_at_one() -> None:
    scores = logits(50, 1.0)
    assert torch.equal(keep_nucleus(scores, 1.0), scores)
