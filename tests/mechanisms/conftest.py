"""The hand-built model and a few of its scenes, made once."""

import pytest

from saesteer.mechanisms.data.pairs import Pair
from saesteer.mechanisms.toys.hand_built import hand_built_model, hand_built_scenes
from saesteer.sae.model.language_model import LanguageModel


@pytest.fixture(scope="session")
def toy() -> LanguageModel:
    """The hand-built model: read only."""
    return hand_built_model()


@pytest.fixture(scope="session")
def scenes() -> list[Pair]:
    """Twelve pairs for it."""
    return hand_built_scenes(12, 0)
