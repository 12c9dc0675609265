"""A language model as judge, behind an OpenAI-compatible endpoint. Not used by default.

Nothing is sent unless an address is given. A judge's grades are reported with its name, next to
those of the checks.
"""

import json
import os
import re
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.steering.checks.words import answer_in, without_thinking
from saesteer.steering.evaluation.letters import Letter
from saesteer.steering.tasks.task import Task

KEY_VARIABLE = "SAESTEER_JUDGE_KEY"
"""Environment variable with the API key, for endpoints that need one."""

PROMPT = """\
You grade how well a reply follows an instruction.

Instruction: {instruction}
Text that the instruction is about:
<text>
{content}
</text>
Reply:
<reply>
{reply}
</reply>

Grades:
A: the reply follows the instruction, and its content is right for the text.
B: the reply recognises the instruction and attempts it, but imperfectly, or its content is wrong.
C: the reply does not follow the instruction.

Answer with one letter: A, B or C."""


@dataclass(frozen=True)
class Judge:
    """Grades replies with a chat model. Call it as `judge(task, content, reply)`."""

    url: str
    """Base address, such as http://127.0.0.1:8000/v1; `/chat/completions` is added."""
    model: str
    """Name of the model, as the endpoint knows it."""
    timeout: float = 60.0
    """Seconds for one answer."""
    waits: tuple[float, ...] = (1.0, 4.0, 15.0)
    """Seconds before each further try, where the endpoint is busy or broke off; what it asks for
    itself (Retry-After) counts, up to a minute."""

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/\s]+", self.url):
            raise UsageError(
                f"`url` must be the address of an OpenAI-compatible endpoint such as "
                f"http://127.0.0.1:8000/v1, got {self.url!r}"
            )
        if not self.model.strip():
            raise UsageError("`judge_model` is empty: give the name the endpoint knows it by")

    def __call__(self, task: Task, content: str, reply: str) -> Letter | None:
        """The grade, or None when the judge's answer holds none.

        Raises UserError when the endpoint cannot be reached or answers with an error.
        """
        prompt = PROMPT.format(
            instruction=task.instruction, content=content, reply=without_thinking(reply)
        )
        document = self._ask(prompt)
        try:
            text = document["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise UserError(
                f"`url` {self.url} sent no choices[0].message.content: is it an "
                "OpenAI-compatible endpoint?"
            ) from None
        return parse_grade(text if isinstance(text, str) else "")

    def check(self) -> None:
        """Ask for nothing in particular. Raises UserError where no question could be answered."""
        self._ask("Answer with the letter A.")

    def _ask(self, prompt: str) -> Any:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 8,
        }
        for wait in self.waits:
            try:
                return self._post(body)
            except _BusyError as error:
                asked = error.retry_after
                time.sleep(wait if asked is None else min(asked, 60.0))
        return self._post(body)

    def _post(self, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions",
            data=json.dumps(body).encode(),
            headers=headers,
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            hint = f"; set {KEY_VARIABLE}" if error.code in (401, 403) else ""
            message = f"`url` {self.url} answered HTTP {error.code}{_reason(error)}{hint}"
            if error.code in (408, 425, 429) or error.code >= 500:
                raise _BusyError(message, error.headers.get("Retry-After")) from error
            raise UserError(message) from error
        except (OSError, ValueError) as error:
            message = f"`url` {self.url} cannot be used ({error}): check the address"
            cause = getattr(error, "reason", error)
            if isinstance(cause, TimeoutError | ConnectionResetError):
                raise _BusyError(message) from error
            raise UserError(message) from error


class _BusyError(UserError):
    """An endpoint that may answer a later try."""

    def __init__(self, message: str, retry_after: str | None = None) -> None:
        super().__init__(message)
        given = (retry_after or "").strip()
        self.retry_after = float(given) if given.isascii() and given.isdigit() else None


def _reason(error: urllib.error.HTTPError) -> str:
    """What the endpoint itself says of an error, in brackets; nothing where it says nothing."""
    try:
        text = error.read(4096).decode("utf-8", "replace")
    except OSError:
        return ""
    try:
        document = json.loads(text)
        found = document.get("error", document) if isinstance(document, dict) else document
        text = found.get("message", "") if isinstance(found, dict) else found
    except ValueError:
        text = re.sub(r"<[^>]*>", " ", text)  # a page of a server in between
    said = " ".join(str(text or "").split())[:300]
    return f" ({said})" if said else ""


def parse_grade(text: str) -> Letter | None:
    """The grade in a judge's answer, thoughts before it apart; None when there is none.

    The letter alone, or after a word such as "grade"; or the letter that a line begins with; or the
    only one of A, B and C that stands alone. The article "A" is none of them.
    """
    text = answer_in(text)
    alone = re.fullmatch(r"[\W_]*([ABCabc])[\W_]*", text)
    if alone:
        return Letter(alone[1].upper())
    # "A reply ..." and "a B": followed by a word, the letter A is an article.
    letter = r"(?<![A-Za-z'’])(?:([BC])|(A)(?!\s+[a-z]))(?![A-Za-z'’])"
    for pattern in (
        rf"(?:[Gg]rade|GRADE|[Vv]erdict|[Rr]ating|[Ss]core|[Aa]nswer)\W{{1,8}}(?:is\W+)?{letter}",
        rf"^[^\w\n]*{letter}\s*(?:[:.,;)\]*–—-]|$)",
        letter,
    ):
        found = {match[1] or match[2] for match in re.finditer(pattern, text, re.MULTILINE)}
        if found:
            return Letter(found.pop()) if len(found) == 1 else None
    return None
