"""An SAE from files on this machine, in any format of `saesteer.checkpoints.formats`."""

from pathlib import Path

from saesteer.checkpoints import formats
from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.formats import detection, training_state
from saesteer.checkpoints.sparse_autoencoder import SAE


def is_there(path: Path, source: str) -> bool:
    """Whether a path refers to a folder, a file, or a run's saved state."""
    return path.exists() or training_state.find(path, source) is not None


def read_sae(path: Path, source: str | None = None) -> SAE:
    """The SAE in a folder or weights file, on the CPU, in the dtype that the file states.

    `source` is what the user wrote, for `SAE.source` and errors; by default the path.

    Raises:
        UserError: no SAE there, or one that is damaged or of an unsupported architecture.
    """
    text = str(path) if source is None else source
    if not is_there(path, text):
        raise UserError(f"`sae` {text} does not exist: {detection.SHAPE}")
    try:
        return formats.read(*detection.detect(path, text))
    except UserError as error:
        message = str(error) if "`sae`" in str(error) else f"`sae` {text}: {error}"
        raise type(error)(message) from error
