"""Programs that tell whether a reply follows an instruction.

A check is a pure function ``check(output, source, **arguments) -> Verdict`` in `CHECKS`; it never
raises on any text and never runs any. `source` is the content the instruction was applied to. An
empty reply fails every check, and one that cannot be judged (too short, cut off by the token limit)
is undetermined, which counts as failed. The thresholds are this project's defaults.

The checks themselves lie in `language_checks`, `format_checks` and `content_checks`; importing this
module fills the table.
"""

from saesteer.steering.checks import content as content_checks
from saesteer.steering.checks import form as format_checks
from saesteer.steering.checks import language as language_checks
from saesteer.steering.checks.registry import CHECKS as CHECKS
from saesteer.steering.checks.registry import Verdict as Verdict
from saesteer.steering.checks.registry import run_check as run_check

__all__ = ["CHECKS", "Verdict", "run_check"]

_FAMILIES = (language_checks, format_checks, content_checks)
