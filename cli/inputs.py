"""The inputs of verbs (model, SAE, prompts) and the folder for their results."""

import contextlib
import json
import random
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from saesteer.checkpoints.errors import UsageError, UserError
from saesteer.checkpoints.files import claim_output
from saesteer.checkpoints.locks import folder_lock
from saesteer.checkpoints.model_files import DEFAULT_MODEL
from saesteer.cli.progress import Report

if TYPE_CHECKING:
    from saesteer.checkpoints.sae_file import SAE
    from saesteer.sae.model.language_model import LanguageModel


def open_model(
    args: Namespace, report: Report, *, name: str | None = None, dtype: str | None = None
) -> "LanguageModel":
    """Load the `LanguageModel` of `--model`, or else of `name`, or else the built-in default."""
    from saesteer.sae.model.language_model import load_model

    chosen = args.model or name or DEFAULT_MODEL
    if args.model is None and Path(chosen).is_absolute() and not Path(chosen).exists():
        raise UserError(
            f"the model that this was made for was at {chosen}, where nothing is now: give "
            "--model, the place where it is"
        )
    report.say(f"loading {chosen}")
    lm = load_model(
        chosen,
        device=args.device,
        dtype=args.dtype if dtype is None else dtype,
        blocks_path=args.blocks,
        progress=report.say,
        device_map=getattr(args, "device_map", None),
        quantize=getattr(args, "quantize", None),
        trust_remote_code=args.trust_remote_code,
        recorded=args.model is None and name is not None,
    )
    kind = str(lm.dtype).removeprefix("torch.")
    report.say(f"loaded {lm.name}: {lm.n_layers} blocks, d_model {lm.d_model}, {kind}, {lm.device}")
    return lm


def exact_dtype(args: Namespace) -> str:
    """`--dtype`, or float32 where it is left to us: what is compared are small differences."""
    return "float32" if args.dtype == "auto" else str(args.dtype)


def open_sae(args: Namespace, report: Report) -> "SAE":
    """Load the SAE of `--sae`, on the CPU, in the dtype of its file."""
    from saesteer.checkpoints.sae_file import load_sae
    from saesteer.sae.model.hooks import check_place, check_site
    from saesteer.sae.model.sae_places import is_plain

    report.say(f"loading {args.sae}")
    sae = load_sae(args.sae)
    if getattr(args, "plan", None) is None:  # a plan says itself where it steers
        if is_plain(sae):
            check_place(sae, args.layer, args.site)
        else:  # the model has to be there to say where the others read and write
            check_site(args.site)
    return sae


def check_reading(args: Namespace) -> None:
    """Refuse a misspelt `--site`, and `--data` without documents, before the model is loaded."""
    if args.site is not None:
        from saesteer.sae.model.hooks import check_site

        check_site(args.site)
    if args.data:
        from saesteer.sae.text.corpora import try_corpora

        try_corpora(args.data)


def check_latent_pages(args: Namespace) -> None:
    """Refuse a `--latent-pages` without pages before the work begins."""
    if args.latent_pages:
        from saesteer.sae.reading.found_pages import latent_pages

        latent_pages(args.latent_pages, (), ".")


def reply_texts(args: Namespace) -> list[str]:
    """The prompts that the model answers for `--replies`."""
    if not args.replies:
        return []
    from saesteer.steering.tasks.task import reply_prompts

    try:
        texts = [prompt.text for prompt in reply_prompts(args.replies, seed=args.seed or 0)]
    except UserError as error:
        raise type(error)(f"--replies {','.join(args.replies)}: {error}") from error
    wanted = args.replies_count
    if wanted is None or wanted >= len(texts):
        return texts
    if wanted < 1:
        raise UsageError(f"--replies-count must be at least 1, got {wanted}")
    chosen = random.Random(args.seed or 0).sample(range(len(texts)), wanted)
    return [texts[i] for i in sorted(chosen)]


def read_prompts(args: Namespace) -> list[str]:
    """The texts of `--prompt` and then those of `--prompts`.

    Raises UserError for a file that cannot be read as prompts, UsageError when there are none.
    """
    texts = list(args.prompt or ())
    if texts:
        from saesteer.sae.text.prompts import check_prompt

        for text in texts:
            check_prompt(text)
    if args.prompts is not None:
        texts += prompts_in(args.prompts)
    if not texts:
        raise UsageError("no prompt: give -p TEXT, or --prompts FILE (.jsonl, .txt, - for stdin)")
    return texts


def prompts_in(name: str, flag: str = "--prompts") -> list[str]:
    """The prompts of a .jsonl or .txt file, or of stdin (-); errors name the flag."""
    what = f"{flag} {name}"
    if Path(name).suffix.lower() in _NOT_LINES:
        raise UserError(
            f'{what} is no .jsonl or .txt file: write one {{"prompt": "..."}} a line, or one '
            "prompt a line"
        )
    lines = lines_of(name, flag, "prompt")
    is_json = lines[0][1].lstrip().startswith("{") if name == "-" else name.endswith(".jsonl")
    if not is_json:
        return [line.rstrip("\r") for _, line in lines]
    return [_prompt_of(line, f"{what} line {i}") for i, line in lines]


def lines_of(name: str, flag: str, held: str) -> list[tuple[int, str]]:
    """The lines of a file, or of stdin (-), that are not blank, with their numbers.

    Raises UserError for a file that cannot be read, or has none; it names the flag, and what a line
    should hold.
    """
    what = f"{flag} {name}"
    try:
        if name == "-":
            content = sys.stdin.read()
        else:
            content = Path(name).expanduser().read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{what} does not exist: check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 (byte {error.start}): convert it") from None
    except OSError as error:
        raise UserError(f"{what} cannot be read: {error.strerror}") from None
    lines = [(i, line) for i, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{what} holds no {held}: give one a line")
    return lines


def _prompt_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where} is not JSON: write one object a line") from None
    text = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{where} has no text under "prompt": write {{"prompt": "..."}}')
    from saesteer.sae.text.prompts import check_text

    check_text(text, where)
    return text


_NOT_LINES = (".json", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".zip", ".yaml", ".yml")
"""Ends of names of files whose lines are not prompts."""


# --- the folder for the results ------------------------------------------------------------------


@contextlib.contextmanager
def reserved(
    args: Namespace, *, locked: bool = True, **inputs: str | Path | Sequence[str] | None
) -> Iterator[None]:
    """Check `--out` before the work begins, and remove a new folder that stays empty on failure.

    A folder that `--force` will empty is not touched here: its results stay until there are new
    ones. Raises UsageError when the folder holds one of `inputs`, the paths given with other flags,
    because emptying it would delete them.

    The folder is locked meanwhile, so that two commands cannot write to it. `locked` is False for
    verbs whose library call locks it, or replaces the whole folder at once.
    """
    if args.out is None:
        yield
        return
    folder = args.out = Path(args.out).expanduser()
    for flag, value in inputs.items():
        for path in [value] if isinstance(value, str | Path) else value or ():
            _refuse_input(folder, f"--{flag}", path)
    is_new = not folder.exists()
    resume = getattr(args, "resume", False)
    if resume or not args.force or not folder.is_dir():
        claim_output(folder, resume=resume, force=args.force, can_resume=hasattr(args, "resume"))
    try:
        with folder_lock(folder) if locked else contextlib.nullcontext():
            yield
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):  # not empty: what is in it is worth keeping
                folder.rmdir()
        raise


def take_folder(args: Namespace) -> Path:
    """Claim `--out` and empty it, just before it is written to."""
    return claim_output(args.out, force=args.force)


def _refuse_input(folder: Path, flag: str, path: str | Path) -> None:
    """Raise UsageError when the folder, which `--force` empties, holds what the verb reads."""
    source = Path(path).expanduser()
    if source.exists() and source.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"--out {folder} holds what {flag} reads: choose another --out")
