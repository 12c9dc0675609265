"""The parser of a verb's flags: one-line errors, aliases, negative values and config files."""

import argparse
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from saesteer.checkpoints.errors import UsageError, UserError, meant, none_of
from saesteer.cli.values import LISTS

ALIASES = {
    "-m": "--model",
    "--layers": "--layer",
    "--strength": "--scale",
    "--alpha": "--scale",
    "--coeff": "--scale",
    "--multiplier": "--scale",
    "--positions": "--scope",
    "--to": "--out",
}
"""Names from other tools that work as well and are not in the help."""


class Repeated(argparse.Action):
    """Collects a repeatable flag in a tuple. The first use drops what a config file gave."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[object] | None,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest, None)
        kept = () if before is None or before is self.default else before
        setattr(namespace, self.dest, (*kept, values))


class VerbParser(argparse.ArgumentParser):
    """The flags of one verb. Errors are `UsageError`s of one line that name the flag."""

    def __init__(self, verb: str, summary: str, example: str, needed: str = "") -> None:
        """`needed`: what the verb cannot do without, as its usage line shows it."""
        super().__init__(
            prog=f"saesteer {verb}",
            usage=" ".join(["saesteer", verb, *needed.split(), "[flags]"]),
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=_HelpFormatter,
            # An abbreviation would change its meaning with the next flag we add.
            allow_abbrev=False,
        )
        self.verb = verb

    def flags(self) -> dict[str, argparse.Action]:
        """Every option string with what it does."""
        return {option: action for action in self._actions for option in action.option_strings}

    def read(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse a command line: its flags, then those of its config files, then defaults.

        Raises UsageError for unknown flags and for values that are not valid.
        """
        words = self._plain_words(argv)
        args, unknown = self.parse_known_args(words)
        if unknown:
            raise UsageError(self._complaint(unknown))
        if getattr(args, "config", None):  # verbs that only list have no such flag
            for file in args.config:
                self.set_defaults(**self._config(Path(file).expanduser()))
            args, _ = self.parse_known_args(words)
        return args

    def error(self, message: str) -> NoReturn:
        """Turn argparse's message into ours: `--flag: what is wrong`."""
        found = re.fullmatch(r"argument (\S+): (.*)", message, flags=re.DOTALL)
        if not found:
            raise UsageError(f"{message} ({self._where_to_look()})")
        flag, reason = found[1].split("/")[-1], found[2]
        if reason.startswith("expected"):
            metavar = self.flags()[flag].metavar
            raise UsageError(f"{flag} needs a value: {flag} {metavar} ({self._where_to_look()})")
        if reason.startswith("ignored explicit argument"):
            raise UsageError(f"{flag} takes no value ({self._where_to_look()})")
        if found := re.match(r"invalid choice: '(.*?)' \(", reason, flags=re.DOTALL):
            raise none_of(flag, map(str, self.flags()[flag].choices or ()), found[1])
        raise UsageError(f"{flag} {reason}")

    def _where_to_look(self) -> str:
        return f"see saesteer {self.verb} --help"

    def _complaint(self, unknown: Sequence[str]) -> str:
        flag = next((word for word in unknown if word.startswith("-")), None)
        if flag is None:
            return f"unexpected {unknown[0]!r}: every value belongs to a flag, see --help"
        flag = flag.split("=")[0]
        return f"{self.verb} has no flag {flag}{self._suggestion(flag)}"

    def _suggestion(self, flag: str) -> str:
        from difflib import get_close_matches

        from saesteer.cli.other_tools import answer

        if known := answer(flag, self.flags()):
            return f": {known}"
        names = {option.lstrip("-"): option for option in self.flags()}
        close = get_close_matches(flag.lstrip("-"), names, n=1)
        return f": did you mean {names[close[0]]}?" if close else f": {self._where_to_look()}"

    def _plain_words(self, argv: Sequence[str]) -> list[str]:
        """Replace aliases by main names, and tie values that start with a minus to their flags."""
        known = self.flags()
        words: list[str] = []
        waiting: str | None = None
        for position, word in enumerate(argv):
            if waiting is not None and _is_value(word, known, known[waiting]):
                words[-1] = f"{waiting}={word}"
                waiting = None
                continue
            waiting = None
            if word == "--":
                return [*words, *argv[position:]]
            if word.startswith("-m") and len(word) > 2:  # -mNAME
                word = f"-m={word[2:].removeprefix('=')}"
            flag, equals, value = word.partition("=")
            if ALIASES.get(flag) in known:
                flag = ALIASES[flag]
                word = f"{flag}{equals}{value}"
            if not equals and flag in known and known[flag].nargs is None:
                waiting = flag
            words.append(word)
        return words

    # --- config files ---

    def _config(self, file: Path) -> dict[str, object]:
        """The values in a config file, by the attribute they set."""
        values = {}
        for key, raw in _read_yaml(file).items():
            option = "--" + str(key).replace("_", "-")
            option = ALIASES.get(option, option)
            action = self.flags().get(option)
            if action is None or action.dest in ("config", "help"):
                hint = self._suggestion(option)
                raise UsageError(f"--config {file}: unknown key {key!r} for {self.verb}{hint}")
            if raw in ("", "~", "null"):
                continue
            try:
                values[action.dest] = _config_value(action, option, raw)
            except (argparse.ArgumentTypeError, ValueError) as error:
                raise UsageError(f"--config {file}: {key} {error}") from error
        return values


def _is_value(word: str, known: dict[str, argparse.Action], action: argparse.Action) -> bool:
    """Whether a word that starts with a minus is the value of the flag before it."""
    if not word.startswith("-") or word in known or word.split("=")[0] in known:
        return False
    return action.dest == "prompt" or re.match(r"-\.?\d", word) is not None


def _read_yaml(file: Path) -> dict[object, object]:
    import yaml

    from saesteer.checkpoints.yaml_text import parse_yaml

    try:
        # Every scalar stays the text that was written, and gets the type of its flag: YAML's own
        # types would read 9143:12 as a time of day and 1e-3 as a word.
        content = parse_yaml(file.read_text(encoding="utf-8"), yaml.BaseLoader)
    except FileNotFoundError:
        raise UsageError(f"--config {file} does not exist: check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"--config {file} is not UTF-8: convert it") from None
    except OSError as error:
        raise UserError(f"--config {file} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise UsageError(f"--config {file} is not valid YAML{where}: write `flag: value`") from None
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"--config {file} must hold `flag: value` lines")
    return content


_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _config_value(action: argparse.Action, option: str, raw: object) -> object:
    truth = _TRUTH.get(raw.lower()) if isinstance(raw, str) else None
    if action.nargs == "?" and truth is not None:
        return action.const if truth else None
    if action.nargs == 0:
        if truth is None:
            raise ValueError(f"must be true or false, got {raw!r}")
        # `no-chat: true` means `chat: false`.
        opposite = isinstance(action, argparse.BooleanOptionalAction) and option.startswith("--no-")
        return truth != opposite
    if isinstance(action, Repeated):
        return tuple(_typed(action, item) for item in (raw if isinstance(raw, list) else [raw]))
    if isinstance(raw, list) and action.type in LISTS and all(isinstance(i, str) for i in raw):
        raw = ",".join(raw)
    return _typed(action, raw)


def _typed(action: argparse.Action, raw: object) -> object:
    if not isinstance(raw, str):
        kind = "list" if isinstance(raw, list) else "mapping"
        raise ValueError(f"must be one value, got a {kind}")
    value = action.type(raw) if callable(action.type) else raw
    if action.choices is not None and value not in action.choices:
        raise ValueError(
            f"must be one of {', '.join(action.choices)}, got {raw!r}{meant(raw, action.choices)}"
        )
    return value


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Lines of 100 columns, and a flag's value shown once: `-o, --out DIR`."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)

    def _split_lines(self, text: str, width: int) -> list[str]:
        # Names such as python-docs and --rank-contents stay on one line.
        return textwrap.wrap(text, width, break_on_hyphens=False)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        options = ", ".join(action.option_strings)
        if not options:  # a verb's one argument without a flag
            return str(action.metavar)
        return options if action.nargs == 0 else f"{options} {action.metavar}"
