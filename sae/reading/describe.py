"""Descriptions of latents: by a chat model that is shown contexts, or offline by log-odds.

Both are scored in the same way, on windows of held-out text that went into neither: the detection
score of delphi (Paulo et al., Automatically Interpreting Millions of Features in Large Language
Models, arXiv 2410.13928). A judge says of each window whether the description fits it; the score is
the balanced accuracy, and 0.5 is chance.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.reading.card import Context, Description, Detection, LatentCard, quoted
from saesteer.sae.runs.endpoint import ChatEndpoint

OFFLINE = "log-odds"
"""Who a description without a model is by."""
KEY_VARIABLE = "SAESTEER_DESCRIBE_KEY"
WINDOWS_AT_ONCE = 5
"""As in delphi: more in one question, and the judge loses count."""

_SHOWN_TOKENS = 5
_SHOWN_RAISED = 3
_EXAMPLES = 15

_EXPLAIN = """\
You look for what a feature of a language model responds to. You are given excerpts of text in \
which it is active. Tokens on which it is active stand between << and >>; the numbers after each \
excerpt say how strongly, from 0 to 10.

Say in one short phrase what these marked tokens, or their surroundings, have in common. Be \
specific: what holds for nearly all of the excerpts and for little other text. Do not speak of \
markers, activations or excerpts, and do not list alternatives. Write the phrase alone, on one \
line."""

_DETECT = """\
You are given a description of something that can occur in text, and some numbered excerpts. \
Decide for each excerpt whether it contains what is described. Answer with one JSON list of 0 and \
1, one number an excerpt in their order (1: it does), and nothing else."""


@dataclass(frozen=True)
class Window:
    """A window of held-out text as a judge sees it, and whether the latent fires in it."""

    text: str
    tokens: frozenset[int]
    fires: bool


def offline_description(card: LatentCard) -> str:
    """A sentence of a latent's most telling tokens and of what it raises; no model is asked."""
    raised = quoted([one.token for one in card.lens_up[:_SHOWN_RAISED]])
    telling = card.telling[:_SHOWN_TOKENS]
    if not card.fired:
        return f"never fires on these {card.rows:,} tokens; raises {raised}"
    if not telling:
        return f"no token stands out where it fires; raises {raised}"
    return f"fires on {quoted([one.token for one in telling])}; raises {raised}"


def offline_detection(tokens: Sequence[int], windows: Sequence[Window]) -> Detection:
    """How well "one of these tokens is there" says where a latent fires."""
    wanted = frozenset(tokens[:_SHOWN_TOKENS])
    return detection([(window, not wanted.isdisjoint(window.tokens)) for window in windows])


def detection(answers: Sequence[tuple[Window, bool | None]]) -> Detection:
    """The score of a judge's answers; None where it gave none."""
    right = [(window.fires, answer == window.fires) for window, answer in answers]
    return Detection(
        positives=sum(fires for fires, _ in right),
        found=sum(fires and correct for fires, correct in right),
        negatives=sum(not fires for fires, _ in right),
        refused=sum(not fires and correct for fires, correct in right),
        unanswered=sum(answer is None for _, answer in answers),
    )


class Describer:
    """Asks a chat model for descriptions, and to judge them."""

    def __init__(self, url: str, model: str, *, timeout: float = 120.0) -> None:
        """
        Args:
            url: base address of an OpenAI-compatible endpoint.
            model: the name that the endpoint knows the model by.

        Raises UsageError for what is no address, or no name.
        """
        if not model.strip():
            raise UsageError("`describe_model` is empty: give the name the endpoint knows it by")
        self.model = model
        self._ask = ChatEndpoint(url, model, "describe", KEY_VARIABLE, timeout=timeout).ask

    def check(self) -> None:
        """Raises UserError where the endpoint answers nothing."""
        self._ask([{"role": "user", "content": "Answer with the number 1."}], 8)

    def describe(self, contexts: Sequence[Context], windows: Sequence[Window]) -> Description:
        """A description made from `contexts`, and its score on `windows`."""
        text = parse_description(self._ask(explaining(contexts), 200))
        answers: list[tuple[Window, bool | None]] = []
        for first in range(0, len(windows), WINDOWS_AT_ONCE):
            part = windows[first : first + WINDOWS_AT_ONCE]
            said = parse_list(self._ask(detecting(text, part), 100), len(part))
            answers += zip(part, said, strict=True)
        return Description(text, self.model, detection(answers) if windows else None)


def explaining(contexts: Sequence[Context]) -> list[dict[str, str]]:
    """The question for a description."""
    shown = contexts[:_EXAMPLES]
    most = max((abs(context.act) for context in shown), default=0.0) or 1.0
    lines = [f"{i}: {_marked(context, most)}" for i, context in enumerate(shown, 1)]
    return [
        {"role": "system", "content": _EXPLAIN},
        {"role": "user", "content": "\n".join(lines)},
    ]


def detecting(description: str, windows: Sequence[Window]) -> list[dict[str, str]]:
    """The question which of some windows a description fits."""
    lines = [f"{i}: {' '.join(window.text.split())}" for i, window in enumerate(windows)]
    asked = f"Description: {description}\n\nExcerpts:\n" + "\n".join(lines)
    return [{"role": "system", "content": _DETECT}, {"role": "user", "content": asked}]


def _marked(context: Context, most: float) -> str:
    """A context with its active tokens between << and >>, and how active those are."""
    text, inside, strengths = "", False, []
    for token, act in zip(context.tokens, context.acts, strict=True):
        if (act != 0) != inside:
            text += ">>" if inside else "<<"
            inside = not inside
        text += token
        if act:
            strengths.append(f"{token.strip()!r} {round(10 * abs(act) / most)}")
    return f"{' '.join((text + ('>>' if inside else '')).split())} ({', '.join(strengths)})"


def parse_description(answer: str) -> str:
    """The phrase in a model's answer: its last line, after thoughts, without a label or quotes."""
    answer = re.sub(r"(?s)^.*</think>", "", answer)
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    if not lines:
        return "(the model gave no description)"
    text = re.sub(r"^\W*(?:explanation|description|answer|phrase)\W*:\W*", "", lines[-1],
                  flags=re.IGNORECASE)  # fmt: skip
    return text.strip(" *\"'`“”")[:300] or "(the model gave no description)"


def parse_list(answer: str, count: int) -> list[bool | None]:
    """The judge's list of 0 and 1; None for each window where it gave no such list."""
    answer = re.sub(r"(?s)^.*</think>", "", answer)
    for found in reversed(re.findall(r"\[[^\[\]]*\]", answer)):
        try:
            values = json.loads(found)
        except ValueError:
            continue
        if len(values) == count and all(value in (0, 1) for value in values):
            return [bool(value) for value in values]
    return [None] * count
