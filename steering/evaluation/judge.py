"""A language model as judge, behind an OpenAI-compatible endpoint. Not used by default.

Nothing is sent unless an address is given. A judge's grades are reported with its name, next to
those of the checks.
"""

import re
from dataclasses import dataclass

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.runs.endpoint import ChatEndpoint
from saesteer.steering.checks.words import answer_in, without_thinking
from saesteer.steering.evaluation.letters import Letter
from saesteer.steering.tasks.task import Task

KEY_VARIABLE = "SAESTEER_JUDGE_KEY"
"""Environment variable with the API key, for endpoints that need one."""

_LONGEST = 8
"""Tokens of an answer: a letter."""

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
        _ = self._endpoint  # refuses what is no address
        if not self.model.strip():
            raise UsageError("`judge_model` is empty: give the name the endpoint knows it by")

    def __call__(self, task: Task, content: str, reply: str) -> Letter | None:
        """The grade, or None when the judge's answer holds none.

        Raises UserError when the endpoint cannot be reached or answers with an error.
        """
        prompt = PROMPT.format(
            instruction=task.instruction, content=content, reply=without_thinking(reply)
        )
        return parse_grade(self._endpoint.ask([{"role": "user", "content": prompt}], _LONGEST))

    def check(self) -> None:
        """Ask for nothing in particular. Raises UserError where no question could be answered."""
        question = "Answer with the letter A."
        self._endpoint.ask([{"role": "user", "content": question}], _LONGEST)

    @property
    def _endpoint(self) -> ChatEndpoint:
        return ChatEndpoint(
            self.url, self.model, "url", KEY_VARIABLE, timeout=self.timeout, waits=self.waits
        )


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
