"""Scopes of plans, completed with the arguments of `steer`."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from saesteer.checkpoints.errors import UsageError
from saesteer.sae.model.language_model import LanguageModel
from saesteer.sae.text.prompts import EncodedPrompt
from saesteer.steering.hooking.chats import reply_header, reply_tail
from saesteer.steering.hooking.scope import Scope, parse_scope
from saesteer.steering.plans.plan import TaskIdentity


@dataclass(frozen=True)
class ScopeArguments:
    """The arguments of `steer` that scopes depend on."""

    prompts: Sequence[EncodedPrompt] | None
    instructions: Sequence[str] | None
    include_first: bool
    include_template: bool
    exclude_special: bool

    def resolve(self, lm: LanguageModel, text: str, task: TaskIdentity | None) -> Scope:
        """The scope with all it needs, checked here rather than at the first forward pass.

        Raises what `Scope.row` raises for the prompts.
        """
        scope = parse_scope(
            text,
            include_first=self.include_first,
            include_template=self.include_template,
            exclude_special=self.exclude_special,
        )
        if scope.kind == "after-instruction":
            wordings = _wordings(task) if self.instructions is None else self.instructions
            scope = dataclasses.replace(scope, instructions=tuple(wordings))
        if scope.kind == "assistant":
            scope = dataclasses.replace(scope, reply_header=reply_header(lm))
        if scope.kind == "tail":
            if not self.prompts:
                return dataclasses.replace(scope, tail=reply_tail(lm))
            for prompt in self.prompts:
                scope.row(len(prompt), prompt)
        if scope.needs_prompts:
            for prompt in self.prompts or ():
                scope.row(len(prompt), prompt)
            if not self.prompts:
                scope.row(0)
        return scope


def _wordings(task: TaskIdentity | None) -> Sequence[str]:
    """The wordings of the instruction that a plan was ranked for."""
    if task is None or task.instructions:
        return () if task is None else task.instructions
    from saesteer.steering.tasks.task import builtin_tasks, load_task

    # Older plans do not hold wordings. The built-in task is the same one if its hash is equal.
    if task.name in builtin_tasks():
        built_in = load_task(task.name)
        if built_in.hash == task.hash:
            return built_in.wordings
    raise UsageError(
        "`scope` after-instruction needs the wordings of the plan's task, and this plan of "
        f"{task.name} does not hold them: make the plan again with rank, or use another `scope`"
    )
