"""A language model as judge, behind an OpenAI-compatible endpoint. Not used by default.

Nothing is sent unless an address is given. A judge's grades are reported with its name, next to
those of the checks.
"""

import json
import os
import re
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.steering.evaluation.grading import Grade
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

    def __post_init__(self) -> None:
        if not re.match(r"https?://[^/\s]+", self.url):
            raise UsageError(
                f"`url` must be the address of an OpenAI-compatible endpoint such as "
                f"http://127.0.0.1:8000/v1, got {self.url!r}"
            )
        if not self.model.strip():
            raise UsageError("`judge_model` is empty: give the name the endpoint knows it by")

    def __call__(self, task: Task, content: str, reply: str) -> Grade | None:
        """The grade, or None when the judge's answer holds none.

        Raises UserError when the endpoint cannot be reached or answers with an error.
        """
        prompt = PROMPT.format(instruction=task.instruction, content=content, reply=reply)
        document = self._post(
            {
                "model": self.model,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": 0,
                "max_tokens": 8,
            }
        )
        try:
            text = document["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise UserError(
                f"`url` {self.url} sent no choices[0].message.content: is it an "
                "OpenAI-compatible endpoint?"
            ) from None
        return parse_grade(text if isinstance(text, str) else "")

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
            raise UserError(f"`url` {self.url} answered HTTP {error.code}{hint}") from error
        except (OSError, ValueError) as error:
            raise UserError(
                f"`url` {self.url} cannot be used ({error}): check the address"
            ) from error


def parse_grade(text: str) -> Grade | None:
    """The grade in a judge's answer: a letter A, B or C that stands alone, the first one."""
    found = re.search(r"(?<![A-Za-z])([ABC])(?![A-Za-z])", text)
    return Grade(found[1]) if found else None
