"""Flags that verbs share, the types of their values, and config files."""

import argparse
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from saesteer.checkpoints.errors import UsageError, UserError

ALIASES = {
    "-m": "--model",
    "--layers": "--layer",
    "--strength": "--scale",
    "--alpha": "--scale",
    "--coeff": "--scale",
    "--multiplier": "--scale",
    "--positions": "--scope",
}
"""Names from other tools that work as well and are not in the help."""

DEFAULT_MODEL = "smollm2-135m-instruct"

_DTYPES = {
    "auto": "auto",
    **{name: "float32" for name in ("float32", "fp32", "f32")},
    **{name: "bfloat16" for name in ("bfloat16", "bf16")},
    **{name: "float16" for name in ("float16", "fp16", "f16")},
}


_THOUSANDS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}


# --- types ---------------------------------------------------------------------------------------


def count(text: str) -> int:
    """A whole number; `200k`, `1.5M`, `2e6` and `1_000_000` are understood."""
    if re.fullmatch(r"[+-]?\d[\d_]*", text.strip()):
        return int(text.replace("_", ""))
    found = re.fullmatch(r"([+-]?\d*\.?\d+(?:e[+]?\d+)?)([kKmMgG]?)", text.strip())
    if found:
        value = float(found[1]) * _THOUSANDS[found[2].lower()]
        if value == round(value):
            return round(value)
    raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}")
    return value


def seed(text: str) -> int:
    """A whole number that is not negative."""
    value = count(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text!r}")
    return value


def counts(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them: `1024,4096`."""
    return _distinct(count(part) for part in _parts(text))


def one_layer(text: str) -> int:
    """A block index; negative counts from the end."""
    if not re.fullmatch(r"[+-]?\d+", text.strip()):
        raise argparse.ArgumentTypeError(f"must be one block index such as 20 or -1, got {text!r}")
    return int(text)


def layers(text: str) -> tuple[int, ...]:
    """Block indices: `10,20`, `8-12` (both ends included), `-1` (from the end), `-4--1`."""
    found: list[int] = []
    for part in _parts(text):
        match = re.fullmatch(r"(-?\d+)(?:-(-?\d+))?", part)
        if not match:
            raise argparse.ArgumentTypeError(
                f"must be block indices such as 20, 10,20, 8-12 or -1, got {text!r}"
            )
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if (first < 0) != (last < 0) or last < first:
            raise argparse.ArgumentTypeError(
                f"has a range {part!r} that does not go upwards: write 8-12 or -4--1"
            )
        found += range(first, last + 1)
    return _distinct(found)


def names(text: str) -> tuple[str, ...]:
    """Words with commas between them."""
    return tuple(_parts(text))


def latents(text: str) -> str:
    """`ID:VALUE,ID:VALUE`, kept as text: `steering.plan.parse_latents` reads it."""
    return text.strip()


def dtype(text: str) -> str:
    """The name of a float type, `auto` included."""
    if text.lower() not in _DTYPES:
        raise argparse.ArgumentTypeError(
            f"must be auto, float32, bfloat16 or float16, got {text!r}"
        )
    return _DTYPES[text.lower()]


def stored_dtype(text: str) -> str:
    """The name of a float type to store."""
    if text.lower() == "auto" or text.lower() not in _DTYPES:
        raise argparse.ArgumentTypeError(f"must be float32, bfloat16 or float16, got {text!r}")
    return _DTYPES[text.lower()]


_LISTS = (counts, layers, names, latents)
"""Types whose values may be written as a YAML list in a config file."""


def _parts(text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"has an empty item in {text!r}")
    return parts


def _distinct(values: Iterable[int]) -> tuple[int, ...]:
    found = tuple(values)
    twice = sorted({value for value in found if found.count(value) > 1})
    if twice:
        raise argparse.ArgumentTypeError(f"names {twice[0]} twice")
    return found


# --- the parser ----------------------------------------------------------------------------------


class Repeated(argparse.Action):
    """Collects a repeatable flag in a tuple. The first use drops what a config file gave."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest, None)
        kept = () if before is None or before is self.default else before
        setattr(namespace, self.dest, (*kept, values))


class VerbParser(argparse.ArgumentParser):
    """The flags of one verb. Errors are `UsageError`s of one line that name the flag."""

    def __init__(self, verb: str, summary: str, example: str) -> None:
        super().__init__(
            prog=f"saesteer {verb}",
            usage=f"saesteer {verb} [flags]",
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

        Raises UsageError for anything that cannot be.
        """
        words = self._plain_words(argv)
        args, unknown = self.parse_known_args(words)
        if unknown:
            raise UsageError(self._complaint(unknown))
        if args.config:
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

        close = get_close_matches(flag, self.flags(), n=1)
        return f": did you mean {close[0]}?" if close else f": {self._where_to_look()}"

    def _plain_words(self, argv: Sequence[str]) -> list[str]:
        """Put main names for aliases, and tie values that start with a minus to their flags."""
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
            flag, equals, value = word.partition("=")
            if ALIASES.get(flag) in known:
                flag = ALIASES[flag]
                word = f"{flag}{equals}{value}"
            if not equals and flag in known and known[flag].nargs is None:
                waiting = flag
            words.append(word)
        return words

    # --- config files ---

    def _config(self, file: Path) -> dict[str, Any]:
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


def _read_yaml(file: Path) -> dict[Any, Any]:
    import yaml

    try:
        # Every scalar stays the text that was written, and gets the type of its flag: YAML's own
        # types would read 9143:12 as a time of day and 1e-3 as a word.
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
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


def _config_value(action: argparse.Action, option: str, raw: Any) -> Any:
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
    if isinstance(raw, list) and action.type in _LISTS and all(isinstance(i, str) for i in raw):
        raw = ",".join(raw)
    return _typed(action, raw)


def _typed(action: argparse.Action, raw: Any) -> Any:
    if not isinstance(raw, str):
        kind = "list" if isinstance(raw, list) else "mapping"
        raise ValueError(f"must be one value, got a {kind}")
    value = action.type(raw) if callable(action.type) else raw
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"must be one of {', '.join(action.choices)}, got {raw!r}")
    return value


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Wider columns, and a flag's value shown once: `-o, --out DIR`."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        options = ", ".join(action.option_strings)
        return options if action.nargs == 0 else f"{options} {action.metavar}"


# --- flags of several verbs ----------------------------------------------------------------------


def default(config: type, field: str) -> str:
    """The default of a field of a config dataclass, as the help of its flag shows it."""
    value = next(f.default for f in fields(config) if f.name == field)
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"(default: {text})"


def given(args: argparse.Namespace, config: type) -> dict[str, Any]:
    """The fields of a config dataclass whose flags were given; the rest keep their defaults."""
    values = {field.name: getattr(args, field.name, None) for field in fields(config)}
    return {name: value for name, value in values.items() if value is not None}


def need(args: argparse.Namespace, flag: str, why: str) -> Any:
    """The value of a flag that a verb cannot do without. Raises UsageError when it is missing."""
    value = getattr(args, flag.removeprefix("--").replace("-", "_"))
    if value is None:
        raise UsageError(f"{flag} is missing: {why}")
    return value


LM_DTYPE_HELP = (
    "arithmetic of the language model: auto, float32, bfloat16 or float16 (default: auto, bfloat16 "
    "where the device is fast in it, else float32)"
)


def add_common(
    parser: VerbParser, *, out: str, force: str | None = None, dtype_help: str = LM_DTYPE_HELP
) -> None:
    """What every verb takes. The other arguments say what flags of these names do there."""
    group = parser.add_argument_group("common")
    group.add_argument(
        "-c", "--config", metavar="FILE", action=Repeated,
        help="YAML file of `flag: value` lines; repeatable, later files win, flags win over files",
    )  # fmt: skip
    group.add_argument("-o", "--out", metavar="DIR", help=out)
    if force is not None:
        group.add_argument("--force", action="store_true", help=force)
    group.add_argument(
        "--seed", type=seed, metavar="N", help="orders data and sampling (default: 0)"
    )
    group.add_argument(
        "--device", default="auto", metavar="NAME",
        help="auto, cpu, cuda or cuda:N (default: auto, a GPU when there is one)",
    )  # fmt: skip
    group.add_argument(
        "--dtype", type=dtype, default="auto", metavar="TYPE", help=dtype_help
    )  # fmt: skip
    group.add_argument(
        "--json", action="store_true", help="print JSON on stdout, and nothing else there"
    )
    group.add_argument("-q", "--quiet", action="store_true", help="no progress on stderr")
    group.add_argument(
        "-v", "--verbose", action="store_true",
        help="log more, let libraries speak, show tracebacks",
    )  # fmt: skip


def add_model(
    group: argparse._ArgumentGroup, fallback: str = f"(default: {DEFAULT_MODEL})"
) -> None:
    """`--model` and `--blocks`."""
    group.add_argument(
        "--model", metavar="NAME",
        help=f"Hub name, folder, .gguf file or alias {fallback}",
    )  # fmt: skip
    group.add_argument(
        "--blocks", metavar="PATH",
        help="module path of the list of decoder blocks (default: found by structure)",
    )  # fmt: skip


def add_text(group: argparse._ArgumentGroup, *, epochs: bool, replies: bool) -> None:
    """The flags of a `TextConfig`."""
    from saesteer.sae.config import TextConfig

    group.add_argument(
        "--data", action=Repeated, metavar="CORPUS",
        help="text file, JSONL with `text` or `messages`, folder, hf:DATASET[:config][:split], or "
        f"python-docs; repeatable {default(TextConfig, 'data')}",
    )  # fmt: skip
    if replies:
        group.add_argument(
            "--replies", type=names, metavar="TASK,...",
            help="mix in what the model itself answers to these instruction tasks (default: none)",
        )  # fmt: skip
        group.add_argument(
            "--replies-share", type=number, metavar="SHARE",
            help=f"share of contexts that hold replies {default(TextConfig, 'replies_share')}",
        )  # fmt: skip
    group.add_argument(
        "--context", type=count, metavar="N",
        help=f"tokens per sequence {default(TextConfig, 'context')}",
    )  # fmt: skip
    group.add_argument(
        "--batch-size", type=count, metavar="N",
        help=f"sequences through the language model at once {default(TextConfig, 'batch_size')}",
    )  # fmt: skip
    group.add_argument(
        "--max-norm-ratio", type=number, metavar="X",
        help="leave out attention sinks: rows longer than X times the running median "
        f"{default(TextConfig, 'max_norm_ratio')}",
    )  # fmt: skip
    if epochs:
        group.add_argument(
            "--epochs", type=count, metavar="N",
            help=f"how often the corpus may be read {default(TextConfig, 'epochs')}",
        )  # fmt: skip


SITE_HELP = (
    "where in the block: resid_post, resid_pre, resid_mid, attn_out, mlp_out or a module path"
)
