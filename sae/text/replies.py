"""The model's own replies to instructions, as text to train on.

An SAE that never saw an instructed behaviour has no latent for it, so the training text includes
the model's own replies with and without instructions.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from saesteer.checkpoints.errors import UserError
from saesteer.checkpoints.files import write_text, writing
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.generation import Completion, generate
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import EncodedPrompt, encode_prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplyConfig:
    """How replies are sampled."""

    max_new_tokens: int = 40
    """Longest reply, in tokens."""
    temperature: float = 0.8
    """0 is greedy."""
    top_p: float = 0.95
    """Nucleus sampling: the share of the probability that tokens are drawn from."""
    seed: int = 0
    """Of the sampling."""
    batch_size: int = 64
    """Prompts answered at a time."""


def sample_replies(
    lm: LanguageModel,
    prompts: Sequence[str],
    folder: Path,
    config: ReplyConfig = ReplyConfig(),
    progress: Progress = no_progress,
) -> Path:
    """Let the model answer `prompts` and return a JSONL corpus of prompts and replies.

    The file lies in `folder` under a name made from the model's weights and chat template, the
    prompts and the settings; a file that exists already is used again. Replies of a chat model
    are `messages` rows, those of a base model `text` rows.

    Raises UserError when there is no prompt, or when all replies are empty.
    """
    if not prompts:
        raise UserError("`replies` names tasks without a single prompt: nothing to answer")
    settings = json.dumps(asdict(config), sort_keys=True)
    template = str(getattr(lm.tokenizer, "chat_template", None))
    named = "\0".join([lm.fingerprint, template, settings, *prompts])
    key = hashlib.sha256(named.encode()).hexdigest()
    path = folder / f"replies-{key[:16]}.jsonl"
    if path.exists():
        return path
    # What was sampled before a run was cut short, so that the next one need not do it again.
    part = path.with_suffix(".part")
    chat = lm.has_chat_template
    sampled = 0

    def on_batch(new_tokens: int) -> None:
        nonlocal sampled
        sampled += new_tokens
        progress("replies", min(sampled, expected), expected, "new tokens")

    expected = len(prompts) * config.max_new_tokens
    progress("replies", 0, expected, "new tokens")
    encoded = [encode_prompt(lm, text, chat=chat) for text in prompts]
    replies = generate(
        lm,
        encoded,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        seed=config.seed,
        batch_size=config.batch_size,
        progress=on_batch,
        finished=read_finished(part, len(prompts)),
        after_batch=lambda made: keep_finished(part, made),
    )
    progress("replies", expected, expected, "new tokens")
    rows = [
        _row(lm, prompt, reply, chat)
        for prompt, reply in zip(encoded, replies, strict=True)
        if reply.text
    ]
    if not rows:
        raise UserError(f"{lm.name} answered every `replies` prompt with nothing")
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    part.unlink(missing_ok=True)
    return path


def keep_finished(part: Path, made: Mapping[int, Completion]) -> None:
    """Put the replies of a batch beside those that are there."""
    with writing(part):
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("a", encoding="utf-8") as file:
            for place, reply in made.items():
                file.write(json.dumps([place, reply.text, reply.token_ids]) + "\n")


def read_finished(part: Path, prompts: int) -> dict[int, Completion]:
    """The replies that were kept; a line that was cut short counts for nothing."""
    found: dict[int, Completion] = {}
    if not part.is_file():
        return found
    for line in part.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            place, text, ids = json.loads(line)
        except (ValueError, TypeError):
            continue
        if isinstance(place, int) and 0 <= place < prompts and isinstance(text, str):
            found[place] = Completion(text, [int(i) for i in ids])
    return found


def _row(
    lm: LanguageModel, prompt: EncodedPrompt, reply: Completion, chat: bool
) -> dict[str, object]:
    if not chat:
        # Decoded together: the reply goes on exactly where the prompt ends.
        ids = [*prompt.token_ids, *reply.token_ids]
        return {"text": lm.tokenizer.decode(ids, skip_special_tokens=True)}
    return {
        "messages": [
            {"role": "user", "content": prompt.text},
            {"role": "assistant", "content": reply.text},
        ]
    }
