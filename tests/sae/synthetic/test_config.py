"""Settings that cannot be are refused by name."""

from typing import Any

import pytest

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.synthetic.config import SyntheticConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": 0}, "`features` must be at least 1, got 0"),
        ({"roots": -1}, "`roots` must be at least 0"),
        ({"lowest_rate": 0.5}, "`lowest_rate` and `highest_rate` must rise"),
        ({"zipf": 0.0}, "`zipf` must be above 0"),
        ({"features": 100}, "need 1360 features, `features` is 100: make the trees smaller"),
        ({"correlation": 0.3}, "must be below 1, got 1.44"),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SyntheticConfig(**settings)


def test_the_default_fits() -> None:
    assert SyntheticConfig().in_trees <= SyntheticConfig().features
