"""All checks: programs that decide whether a reply follows an instruction.

A check is a pure function `check(output, source, **arguments) -> Verdict` in `CHECKS`. It never
raises, whatever the text, and never runs code in it. `source` is the content that the instruction
was applied to. An empty reply fails every check, and one that cannot be judged (too short, cut off
by the token limit) is undetermined, which counts as failed. The thresholds are this project's
defaults.

The checks themselves are in `language`, `form` and `content`; importing this module fills `CHECKS`.
"""

from saesteer.steering.checks import content, form, language  # noqa: F401 (they fill CHECKS)
from saesteer.steering.checks.registry import CHECKS as CHECKS
from saesteer.steering.checks.registry import Verdict as Verdict
from saesteer.steering.checks.registry import run_check as run_check

__all__ = ["CHECKS", "Verdict", "run_check"]
