"""Flags that several verbs share."""

import argparse
from argparse import SUPPRESS
from dataclasses import fields
from typing import Any

from saesteer.checkpoints.errors import UsageError
from saesteer.checkpoints.model_files import DEFAULT_MODEL
from saesteer.cli.parser import Repeated, VerbParser
from saesteer.cli.values import count, count_or_auto, dtype, names, number, one_layer, seed


def default(config: type, field: str) -> str:
    """The default of a field of a config dataclass, as the help of its flag shows it."""
    value = next(f.default for f in fields(config) if f.name == field)
    if value is False:
        return "(default: off)"
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return f"(default: {text})"


def given(args: argparse.Namespace, config: type, **flags: str) -> dict[str, Any]:
    """The fields of a config dataclass whose flags were given; the rest keep their defaults.

    `flags` maps a field to its flag (with underscores) where the two have different names.
    """
    names = {field.name: flags.get(field.name, field.name) for field in fields(config)}
    values = {name: getattr(args, flag, None) for name, flag in names.items()}
    return {name: value for name, value in values.items() if value is not None}


def need(args: argparse.Namespace, flag: str, why: str) -> None:
    """Raise UsageError when a flag that a verb cannot do without is missing."""
    if getattr(args, flag.removeprefix("--").replace("-", "_")) is None:
        raise UsageError(f"{flag} is missing: {why}")


LM_DTYPE_HELP = (
    "arithmetic of the language model: auto, float32, bfloat16 or float16 (default: auto, bfloat16 "
    "where the device is fast in it, else float32)"
)


def add_common(
    parser: VerbParser,
    *,
    out: str | None,
    force: str | None = None,
    seed_help: str | None = "seed of sampling and of the order of the data (default: 0)",
    device_help: str | None = "auto, cpu, cuda or cuda:N (default: auto, a GPU when there is one)",
    dtype_help: str | None = LM_DTYPE_HELP,
    threads: bool = True,
) -> None:
    """The flags of every verb. The arguments are the help texts that differ between verbs, and
    whether it computes on a number of `threads` that can be chosen.

    A help of None hides a flag that the verb has no use for; scripts may give it everywhere.
    """
    group = parser.add_argument_group("common")
    group.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        action=Repeated,
        help="YAML file of `flag: value` lines; repeatable, later files win, flags win over files",
    )
    if out is not None:
        group.add_argument("-o", "--out", metavar="DIR", help=out)
    if force is not None:
        group.add_argument("--force", action="store_true", help=force)
    group.add_argument("--seed", type=seed, metavar="N", help=seed_help or SUPPRESS)
    group.add_argument("--device", default="auto", metavar="NAME", help=device_help or SUPPRESS)
    group.add_argument(
        "--dtype", type=dtype, default="auto", metavar="TYPE", help=dtype_help or SUPPRESS
    )
    if threads:
        group.add_argument(
            "--threads",
            type=count,
            metavar="N",
            help="CPU threads to compute with (default: one for each core)",
        )
    group.add_argument("--json", action="store_true", help="print the results as JSON on stdout")
    group.add_argument("-q", "--quiet", action="store_true", help="show no progress on stderr")
    group.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="show debug messages, warnings of other libraries, and tracebacks",
    )


def add_open(group: argparse._ArgumentGroup) -> None:
    """`--open`, of verbs that end with a page."""
    group.add_argument(
        "--open", action="store_true", help="show the page in a browser when it is written"
    )


def check_open(args: argparse.Namespace) -> None:
    """Raise UsageError where `--open` has no page to show."""
    if args.open and args.out is None:
        raise UsageError("--open needs -o DIR, the folder that the page is written to")


def add_dictionaries(group: argparse._ArgumentGroup) -> None:
    """`--dictionaries`."""
    group.add_argument(
        "--dictionaries",
        metavar="DIR",
        help="folder of bilingual dictionaries in dictd's format, by which translations are graded "
        "(default: SAESTEER_DICTIONARIES, or /usr/share/dictd)",
    )


def add_latent_pages(group: argparse._ArgumentGroup) -> None:
    """`--latent-pages`."""
    group.add_argument(
        "--latent-pages",
        action=Repeated,
        metavar="DIR",
        help="link latents to their pages in this folder, which `latents` wrote; repeatable "
        "(default: what is found beside --out and in the SAE's folder)",
    )


def add_listing(parser: VerbParser) -> None:
    """The flags of verbs that list what there is and write nothing."""
    group = parser.add_argument_group("common")
    group.add_argument("--json", action="store_true", help="print the list as JSON on stdout")
    group.add_argument("-v", "--verbose", action="store_true", help="show tracebacks")


def add_model(
    group: argparse._ArgumentGroup, fallback: str = f"(default: {DEFAULT_MODEL})"
) -> None:
    """`--model`, `--blocks` and `--trust-remote-code`."""
    group.add_argument(
        "--model",
        metavar="NAME",
        help=f"language model: Hub name, folder, .gguf file or alias {fallback}",
    )
    group.add_argument(
        "--blocks",
        metavar="PATH",
        help="module path of the list of decoder blocks (default: found by structure)",
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python files that come with the model (default: none is ever run)",
    )


def add_sae(group: argparse._ArgumentGroup) -> None:
    """`--sae`, the model it belongs to, and where it reads."""
    group.add_argument(
        "--sae",
        metavar="DIR",
        help="folder or file of an SAE in any supported format, RELEASE:ID of sae_lens, or "
        "REPO@REVISION:ID on the Hub (needed)",
    )
    add_model(group, "(default: the one the SAE names)")
    group.add_argument(
        "--layer",
        type=one_layer,
        metavar="L",
        help="block that the SAE reads (default: the SAE's own)",
    )
    group.add_argument("--site", metavar="SITE", help=f"{SITE_HELP} (default: the SAE's own)")


def add_text(group: argparse._ArgumentGroup, *, epochs: bool, replies: bool) -> None:
    """The flags of a `TextConfig`."""
    from saesteer.sae.config import TextConfig

    group.add_argument(
        "--data",
        action=Repeated,
        metavar="CORPUS",
        help="text file, JSONL, Parquet or CSV with `text` or `messages`, folder, "
        "hf:DATASET[:config][:split], or "
        f"python-docs; repeatable {default(TextConfig, 'data')}",
    )
    if replies:
        group.add_argument(
            "--replies",
            type=names,
            metavar="TASK,...",
            help="add the model's own replies to these instruction tasks to the text (default: "
            "none)",
        )
        group.add_argument(
            "--replies-share",
            type=number,
            metavar="SHARE",
            help="share of the contexts that are filled with replies "
            f"{default(TextConfig, 'replies_share')}",
        )
        add_reply_sampling(
            group,
            TextConfig,
            "at most N replies, drawn from those of all tasks (default: all)",
            tokens="replies_tokens",
            temperature="replies_temperature",
            top_p="replies_top_p",
        )
    group.add_argument(
        "--context",
        type=count,
        metavar="N",
        help=f"tokens per sequence {default(TextConfig, 'context')}",
    )
    group.add_argument(
        "--batch-size",
        type=count_or_auto if epochs else count,
        metavar="N",
        help="sequences per forward pass of the language model"
        f"{', or auto: as many as fit into memory' if epochs else ''} "
        f"{default(TextConfig, 'batch_size')}",
    )
    group.add_argument(
        "--bos",
        choices=("auto", "always", "never"),
        metavar="WHEN",
        help="beginning-of-text token in front of contexts: auto (as the tokenizer does), always, "
        f"never {default(TextConfig, 'bos')}",
    )
    group.add_argument(
        "--max-norm-ratio",
        type=number,
        metavar="X",
        help="leave out attention sinks: activations whose norm exceeds X times the running median "
        f"{default(TextConfig, 'max_norm_ratio')}",
    )
    if epochs:
        group.add_argument(
            "--epochs",
            type=count,
            metavar="N",
            help=f"passes over the corpus at most {default(TextConfig, 'epochs')}",
        )


def add_reply_sampling(
    group: argparse._ArgumentGroup, config: type, number_help: str, **fields_of: str
) -> None:
    """How many of the model's own replies are sampled, and how.

    `fields_of` names the fields of the config dataclass that hold the defaults of `tokens`,
    `temperature` and `top_p`.
    """
    group.add_argument("--replies-count", type=count, metavar="N", help=number_help)
    group.add_argument(
        "--replies-tokens",
        type=count,
        metavar="N",
        help=f"longest reply {default(config, fields_of['tokens'])}",
    )
    group.add_argument(
        "--replies-temperature",
        type=number,
        metavar="T",
        help="temperature that replies are sampled at; 0 is greedy "
        f"{default(config, fields_of['temperature'])}",
    )
    group.add_argument(
        "--replies-top-p",
        type=number,
        metavar="P",
        help="sample replies from the most likely tokens of total probability P "
        f"{default(config, fields_of['top_p'])}",
    )


def add_answering(group: argparse._ArgumentGroup) -> None:
    """Sampling of the answers that `sweep` and `evaluate` grade."""
    group.add_argument(
        "--temperature",
        type=number,
        default=0.7,
        metavar="T",
        help="sampling temperature; 0 is greedy (default: 0.7)",
    )
    group.add_argument(
        "--top-p",
        type=number,
        default=0.95,
        metavar="P",
        help="sample from the most likely tokens of total probability P (default: 0.95)",
    )
    group.add_argument(
        "--batch-size", type=count, default=64, metavar="N", help="prompts per batch (default: 64)"
    )
    add_thinking(group)


def add_thinking(group: argparse._ArgumentGroup) -> None:
    """`--strip-thinking`, of verbs that grade answers."""
    group.add_argument(
        "--strip-thinking",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="leave the thoughts that a model writes before an answer (<think>...</think>) out of "
        "grades, repetition, fluency and the judge's prompt; thoughts that never end leave no "
        "answer (default: on)",
    )


def add_pairs(group: argparse._ArgumentGroup, *, makers: str, n: int) -> None:
    """Pairs of prompts: the same flags for every verb that compares runs."""
    group.add_argument(
        "--pairs",
        metavar="FILE",
        help=".jsonl with clean, corrupt, answer, wrong, positions, group; or a maker: "
        f"{makers} (needed)",
    )
    group.add_argument("--n", type=count, default=n, metavar="N", help=f"pairs (default: {n})")
    group.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="send texts through the chat template (default: off)",
    )


PAIRS_DTYPE_HELP = (
    "arithmetic of the language model: auto, float32, bfloat16 or float16 (default: auto, float32 "
    "here: differences of logits are small)"
)


def add_documents(group: argparse._ArgumentGroup) -> None:
    """How packed documents are read: the same flags for `harvest`, `train` and `metrics`."""
    from saesteer.sae.config import TextConfig

    group.add_argument(
        "--isolate-documents",
        action="store_true",
        help="keep attention inside each document, where the model proves to do so; slower, and "
        "every document begins with BOS, if texts do, and a sink "
        f"{default(TextConfig, 'isolate_documents')}",
    )
    group.add_argument(
        "--exclude-template",
        action="store_true",
        help="leave out the tokens that the chat template adds around messages "
        f"{default(TextConfig, 'exclude_template')}",
    )


def add_reading(group: argparse._ArgumentGroup) -> None:
    """How `harvest` and live `train` run the model on text."""
    add_documents(group)
    group.add_argument(
        "--device-map",
        choices=("auto",),
        metavar="auto",
        help="spread a large model over all devices with accelerate (default: only --device)",
    )
    group.add_argument(
        "--quantize",
        choices=("8bit", "4bit"),
        metavar="BITS",
        help="load the language model in 8bit or 4bit, with bitsandbytes (default: neither)",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="compile the model's blocks with torch.compile: a few seconds at the start, faster "
        "afterwards, slightly different rounding; harvest --dry-run --compile measures the gain "
        "(default: off)",
    )


SITE_HELP = (
    "where in the block: resid_post, resid_pre, resid_mid, attn_out, mlp_out, z (outputs of the "
    "attention heads) or a module path"
)
