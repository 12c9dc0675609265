"""What the tests of this folder share."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def _no_power_cuts() -> Iterator[None]:
    """Let fsync return at once: tests kill writers, not the machine, and a busy disk takes long.

    Tests that count or break fsync replace this one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
