"""Replies that a model has given before, kept on disk so that nothing is sampled twice.

`rank`, `evaluate` and mean differences ask a model the same things again and again, and each run
that is stopped would lose what it has sampled. Replies are kept batch by batch, because a batch is
what a seed belongs to: the same model, prompts and settings give the same batch again.

Nothing is kept unless a program asks for it (`keep_replies`, as the command line does), and nothing
while the model's passes are changed by hooks, as steering does.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.files import write_text

if TYPE_CHECKING:
    from saesteer.sae.model.language_model import LanguageModel

_MOST_FILES = 4096
"""Batches that are kept; the ones not used for longest go first."""

_folder: ContextVar[Path | None] = ContextVar("kept_replies", default=None)


@contextlib.contextmanager
def keep_replies(folder: Path | None) -> Iterator[None]:
    """Inside the block, keep the replies of every unchanged model in `folder`, and use those there;
    None keeps none."""
    token = _folder.set(folder)
    try:
        yield
    finally:
        _folder.reset(token)


class KeptReplies:
    """Batches of replies in a folder, one small file each."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        """`facts`: everything besides prompts and seed that replies depend on, JSON-ready."""
        self.folder = folder
        self.facts = json.dumps(facts, sort_keys=True)

    def _file(self, prompts: Sequence[Sequence[int]], seed: int) -> Path:
        asked = f"{self.facts}\n{seed}\n{json.dumps([list(prompt) for prompt in prompts])}"
        return self.folder / f"batch-{hashlib.sha256(asked.encode()).hexdigest()[:32]}.json"

    def get(self, prompts: Sequence[Sequence[int]], seed: int) -> list[list[int]] | None:
        """The token ids that a batch was answered with; None where it has not been, or the file is
        damaged."""
        path = self._file(prompts, seed)
        try:
            rows = json.loads(path.read_text(encoding="ascii"))
            found = [[int(token) for token in row] for row in rows]
            path.touch()  # used
        except (OSError, ValueError, TypeError):
            return None
        return found if len(found) == len(prompts) else None

    def put(
        self, prompts: Sequence[Sequence[int]], seed: int, rows: Sequence[Sequence[int]]
    ) -> None:
        """Keep the token ids of a batch. A disk that takes no more keeps none, and stops nobody."""
        with contextlib.suppress(UserError, OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self._file(prompts, seed), json.dumps([list(row) for row in rows]))
            self._make_room()

    def _make_room(self) -> None:
        files = list(self.folder.glob("batch-*.json"))
        if len(files) <= _MOST_FILES:
            return
        # More than one, so that not every batch has to look for the oldest.
        for path in sorted(files, key=lambda file: file.stat().st_mtime)[: _MOST_FILES // 8]:
            path.unlink(missing_ok=True)


def kept_replies(lm: "LanguageModel", settings: dict[str, Any]) -> KeptReplies | None:
    """Where the replies of a model under some settings are kept; None where none are."""
    folder = _folder.get()
    if folder is None or _is_changed(lm):
        return None
    import torch
    import transformers

    facts = {
        "model": lm.fingerprint,
        "dtype": str(lm.dtype),
        "device": lm.device.type,
        "versions": [str(torch.__version__), str(transformers.__version__)],
        "generation": lm.model.generation_config.to_dict(),
        **settings,
    }
    return KeptReplies(folder, json.loads(json.dumps(facts, default=str)))


def _is_changed(lm: "LanguageModel") -> bool:
    """Whether anything hears, and may change, the passes of the model."""
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    # Steering that goes over tokens replaces `generate` in the model's own attributes.
    tapped = "generate" in vars(lm.model)
    return tapped or any(getattr(part, name) for part in lm.model.modules() for name in hooks)
