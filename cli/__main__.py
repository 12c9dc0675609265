"""The console script `saesteer`, also `python -m saesteer` and `python -m saesteer.cli`."""

import os
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import cast

from saesteer.checkpoints.errors import SaidElsewhere, UsageError, UserError
from saesteer.checkpoints.model_files import cache_folder
from saesteer.cli.output import ARGUMENT_FLAGS, one_line, print_error, use_flags
from saesteer.cli.parser import ALIASES, VerbParser
from saesteer.cli.threads import use_threads
from saesteer.sae.model.kept_replies import keep_replies

VERBS = {
    "demo": "everything once on a small model: harvest, train, rank, choose a dose, evaluate",
    "harvest": "run text through a model once and store the activations of some layers",
    "train": "train sparse autoencoders, live from a model or from stored activations",
    "metrics": "measure an SAE on held-out text: FVU, L0, dead latents, cross-entropy, KL",
    "rank": "find the latents that carry an instruction, and write a steering plan",
    "latents": "write pages of what latents are: contexts, histograms, lens, neighbours",
    "steer": "generate text with a steering plan, or with latents chosen by number",
    "serve": "answer OpenAI's clients, a plan for each request, with a playground in the browser",
    "sweep": "try doses, numbers of latents and scopes, and keep the best plan",
    "find": "search layers, phases, directions or latents and doses for one task, within a time",
    "evaluate": "compare a plan with every control: a report of success, fluency and damage",
    "grade": "grade answers made anywhere: do they follow, fluently and faithfully",
    "toy": "write a small model whose mechanism is known, with pairs of prompts",
    "patch": "put values of one run into another: which token, block or head carries the answer",
    "circuit": "find the heads that carry an answer, path by path, and test whether they suffice",
    "trace": "account for an answer's logit by tokens, heads and routes, exactly, in one pass",
    "probe": "do states tell tasks apart: classifiers, clusters over checkpoints, moved centroids",
    "attribute": "which prompt tokens drove which tokens of the reply, and how densely",
    "diff": "compare the weights of a base and a tuned model: words of heads, concepts of MLPs",
    "convert": "write an SAE or a plan in another tool's format, and report what differs",
    "doctor": "check that hooks work on a model, and predict time and memory of a job",
    "push": "publish an SAE with a generated model card, on the Hub or in a folder",
    "reproduce": "repeat a recorded training or harvest and compare the results",
    "watch": "show the curves of a training run in the terminal",
    "tasks": "list the instruction tasks that come with the package",
    "formats": "list the file formats that are read and written",
    "models": "list the language models that open without the network",
}
_INTERRUPTED = 130
_NO_MEMORY = "out of memory: lower --batch-size, --batch-tokens or --context, or change --device"
# An unexpected error can quote half a program.
_LONGEST_MESSAGE = 300


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (that of the process when None) and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    _set_encodings()
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0
    if words[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"saesteer {version('saesteer')}")
        return 0
    verbose = "-v" in words or "--verbose" in words
    try:
        if words[0] == "--completion":
            print(_completion(words[1:]))
            return 0
        status = _run(words[0], words[1:])
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader of our output closed it, as in `saesteer rank | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail("interrupted", _INTERRUPTED, verbose)
    except SaidElsewhere:
        return _leave(1)
    except UserError as error:
        return _fail(error, error.exit_status, verbose)
    except Exception as error:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return _fail(_NO_MEMORY, 1, verbose)
        message = one_line(error)[:_LONGEST_MESSAGE]
        what = f"unexpected {type(error).__name__}: {message}" if message else repr(error)
        hint = "" if verbose else " (run with -v for the traceback)"
        return _fail(f"{what}{hint}", 1, verbose)


def _run(verb: str, words: Sequence[str]) -> int:
    parser = make_parser(verb)
    try:
        args = parser.read(words)
    except SystemExit as stop:  # --help has printed
        return int(stop.code or 0)
    use_threads(getattr(args, "threads", None))
    with keep_replies(cache_folder() / "replies"):
        status: int = import_module(f"saesteer.cli.{verb}").run(args)
    return status


def make_parser(verb: str) -> VerbParser:
    """The parser of one verb. Raises UsageError for an unknown verb."""
    if verb not in VERBS:
        raise UsageError(f"{_unknown(verb)}; the verbs are {', '.join(VERBS)}")
    module = import_module(f"saesteer.cli.{verb}")
    needed = getattr(module, "NEEDED", "")  # some verbs need nothing
    parser = VerbParser(verb, _sentence(VERBS[verb]), module.EXAMPLE, needed)
    module.add_flags(parser)
    return parser


def _completion(words: Sequence[str]) -> str:
    """The script that completes verbs and flags in a shell. Raises UsageError for another shell."""
    import argparse

    import shtab

    if len(words) != 1 or words[0] not in shtab.SUPPORTED_SHELLS:
        came = " ".join(words) or "none"
        shells = ", ".join(shtab.SUPPORTED_SHELLS)
        raise UsageError(f"--completion takes one shell of {shells}, got {came}")

    def of_verb(*, prog: str, **_: object) -> VerbParser:
        return make_parser(prog.split()[-1])

    root = argparse.ArgumentParser("saesteer")
    verbs = root.add_subparsers(parser_class=cast(type[VerbParser], of_verb))
    for verb, summary in VERBS.items():
        verbs.add_parser(verb, help=summary)
    return str(shtab.complete(root, shell=words[0]))


@cache
def _flags() -> dict[str, str]:
    """The flags of all verbs, by the name of the argument that each sets."""
    options = {option for verb in VERBS for option in make_parser(verb).flags()}
    found = {option: option for option in options if option.startswith("--")} | ALIASES
    named = {option.lstrip("-").replace("-", "_"): flag for option, flag in found.items()}
    return named | ARGUMENT_FLAGS


# Only this module knows all verbs, and verbs import `output`: so it hands the table down.
use_flags(_flags)


def _unknown(word: str) -> str:
    from difflib import get_close_matches

    if word.startswith("-"):
        return f"the verb comes first, before {word}"
    from saesteer.cli import other_tools

    close = [other_tools.VERBS.get(word.lower(), "")]
    if not close[0]:
        close = get_close_matches(word.lower(), VERBS, n=1)
    return f"unknown verb {word!r}" + (f": did you mean {close[0]}?" if close else "")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _help() -> str:
    width = max(map(len, VERBS))
    return "\n".join(
        [
            "usage: saesteer VERB [flags]",
            "",
            "Sparse autoencoders from raw text to a steered language model.",
            "",
            "verbs:",
            *(f"  {verb.ljust(width)}  {summary}" for verb, summary in VERBS.items()),
            "",
            "`saesteer VERB --help` lists the flags of a verb, `saesteer --version` the version.",
            "`saesteer --completion bash` (zsh, fish, tcsh) prints a script that completes them.",
            "",
            "examples:",
            "  saesteer demo --quick",
            "  saesteer harvest --layer 20 --tokens 200000 --epochs 2 -o runs/activations",
        ]
    )


def _fail(message: object, status: int, verbose: bool) -> int:
    if verbose:
        traceback.print_exc()
    print_error(message)
    return _leave(status)


def _leave(status: int) -> int:
    """End a process of torchrun that has failed: at once, because threads of it may wait for
    others."""
    if "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _set_encodings() -> None:
    """Never fail for a character that a terminal cannot show."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
