"""scikit-learn, which comes with the extra `mechanisms` and is imported where it is used."""

from importlib import import_module
from typing import Any

from saesteer.checkpoints.errors import UserError


def sklearn(module: str) -> Any:
    """A module of scikit-learn. Raises UserError where it is not installed."""
    try:
        return import_module(f"sklearn.{module}")
    except ImportError:
        raise UserError(
            "probes and clusters need scikit-learn, which is not installed: "
            "pip install 'saesteer[mechanisms]'"
        ) from None
