"""What the tests of this folder share."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def faults() -> Any:
    """The module disk_faults.py, which lies beside this file and is no package's."""
    spec = importlib.util.spec_from_file_location(
        "disk_faults", Path(__file__).with_name("disk_faults.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def _no_power_cuts() -> Iterator[None]:
    """Let fsync return at once: tests kill writers, not the machine, and a busy disk takes long.

    Tests that count or break fsync replace this one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
