"""The model's own replies to instructions, as text to train on.

An SAE that never saw an instructed behaviour has no latent for it, so the training mix holds what
the model itself says when instructed (and when not).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.files import write_text
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.generation import generate
from saesteer.sae.models import LanguageModel
from saesteer.sae.prompts import encode_prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplyConfig:
    """How replies are sampled."""

    max_new_tokens: int = 40
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    batch_size: int = 64


def sample_replies(
    lm: LanguageModel,
    prompts: Sequence[str],
    folder: Path,
    config: ReplyConfig = ReplyConfig(),
    progress: Progress = no_progress,
) -> Path:
    """Let the model answer `prompts` and return a JSONL corpus of prompts and replies.

    The file lies in `folder` under a name made from the model's weights, the prompts and the
    settings; when it is already there it is used as it is. Replies of a chat model are `messages`
    rows, those of a base model `text` rows.

    Raises UserError when there is nothing to answer or the model says nothing.
    """
    if not prompts:
        raise UserError("--replies names tasks without a single prompt: nothing to answer")
    settings = json.dumps(asdict(config), sort_keys=True)
    key = hashlib.sha256("\0".join([lm.fingerprint, settings, *prompts]).encode()).hexdigest()
    path = folder / f"replies-{key[:16]}.jsonl"
    if path.exists():
        return path
    chat = lm.has_chat_template
    done = 0

    def on_batch(new_tokens: int) -> None:
        nonlocal done
        done += new_tokens
        progress("replies", min(done, expected), expected, "new tokens")

    expected = len(prompts) * config.max_new_tokens
    progress("replies", 0, expected, "new tokens")
    replies = generate(
        lm,
        [encode_prompt(lm, text, chat=chat) for text in prompts],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
        batch_size=config.batch_size,
        progress=on_batch,
    )
    progress("replies", expected, expected, "new tokens")
    rows = [
        _row(prompt, reply.text, chat)
        for prompt, reply in zip(prompts, replies, strict=True)
        if reply.text
    ]
    if not rows:
        raise UserError(f"{lm.name} answered every --replies prompt with nothing")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def _row(prompt: str, reply: str, chat: bool) -> dict[str, object]:
    if not chat:
        return {"text": f"{prompt}\n{reply}"}
    return {
        "messages": [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": reply},
        ]
    }
