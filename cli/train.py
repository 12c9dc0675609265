"""`saesteer train`: sparse autoencoders, live from a model or from shards."""

import contextlib
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from saesteer.checkpoints.errors import UsageError
from saesteer.cli.flags import (
    SITE_HELP,
    add_common,
    add_model,
    add_reading,
    add_text,
    default,
    given,
    need,
)
from saesteer.cli.inputs import check_reading, open_model, reply_texts, reserved
from saesteer.cli.output import (
    Document,
    amount,
    duration,
    one_line,
    print_json,
    print_next,
    print_table,
)
from saesteer.cli.output import number as figure
from saesteer.cli.parser import VerbParser
from saesteer.cli.progress import reporting
from saesteer.cli.values import count, counts, dtype, folders, layers, number, numbers, one_layer
from saesteer.sae.config import PENALTIES, JumpReLUConfig, TextConfig, TrainConfig
from saesteer.sae.training.architectures import ARCHITECTURES
from saesteer.sae.training.architectures.recipes import recipe_lines, with_recipe

EXAMPLE = (
    "saesteer train --model smollm2-135m-instruct --layer 20 --replies french --tokens 200000 "
    "--epochs 2 -o runs/sae"
)
NEEDED = "(--model NAME --layer L | --activations DIR) -o DIR"

# Flags that say what text goes through a model: shards went through one already.
_LIVE_ONLY = (
    "data",
    "replies",
    "replies_share",
    "replies_count",
    "replies_tokens",
    "replies_temperature",
    "replies_top_p",
    "context",
    "bos",
    "batch_size",
    "epochs",
    "lm_dtype",
    "blocks",
    "isolate_documents",
    "exclude_template",
    "device_map",
    "quantize",
    "trust_remote_code",
    "compile",
)


# What run.json says of an SAE besides the settings of its architecture.
_OF_EVERY_SAE = (
    "layer", "site", "d_model", "d_sae", "init_seed", "peak_lr", "sha256", "fvu_heldout",
    "l0_heldout",
    "threshold",
    "to_layer",
    "to_site",
    "places",
)  # fmt: skip


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    source = parser.add_argument_group("where activations come from: --model or --activations")
    add_model(source, "(live training)")
    source.add_argument(
        "--lm-dtype",
        type=dtype,
        metavar="TYPE",
        help="arithmetic of the language model: auto, float32, bfloat16 or float16 (default: auto)",
    )
    source.add_argument(
        "--activations",
        type=folders,
        metavar="DIR,...",
        help="folder of shards that harvest wrote; for a crosscoder over models, or a transcoder "
        "between sites, several that hold the same tokens",
    )
    source.add_argument(
        "--layer",
        type=layers,
        metavar="L,...",
        help="blocks to train on: 20, or 10,20, or 8-12, or -1 for the last (needed with --model; "
        "default with --activations: every layer stored there)",
    )
    source.add_argument(
        "--site", metavar="SITE", help=f"{SITE_HELP} {default(TrainConfig, 'site')}"
    )
    text = parser.add_argument_group("text, with --model")
    add_text(text, epochs=True, replies=True)
    add_reading(text)
    shape = parser.add_argument_group("the SAE; several values train every combination")
    shape.add_argument(
        "--arch",
        metavar="NAME",
        help=f"architecture: {' or '.join(ARCHITECTURES)} {default(TrainConfig, 'arch')}",
    )
    shape.add_argument(
        "--recipe",
        metavar="NAME",
        help="published settings, with their units converted; flags that are given win (default: "
        f"none): {', '.join(recipe_lines())}",
    )
    shape.add_argument(
        "--d-sae",
        type=counts,
        metavar="N,...",
        help="numbers of latents (default: 8 times d_model)",
    )
    shape.add_argument(
        "--k",
        type=counts,
        metavar="N,...",
        help="latents kept per token; on average with all but topk and abstopk (default: 32)",
    )
    shape.add_argument(
        "--l0",
        type=numbers,
        metavar="X,...",
        help="in place of --k with jumprelu, gemma-scope-2, standard and gated: active latents per "
        "token to aim at, by a penalty whose coefficient is controlled (default: 32)",
    )
    shape.add_argument(
        "--prefixes",
        type=counts,
        metavar="N,...",
        help="with matryoshka and gemma-scope-2: numbers of latents, up to d_sae, that reconstruct "
        "by themselves (default: 1/32, 3/32, 7/32, 15/32 and all of d_sae)",
    )
    shape.add_argument(
        "--to-layer",
        type=one_layer,
        metavar="L",
        help="with the transcoders: the block to reconstruct (default: the one that is read)",
    )
    shape.add_argument(
        "--to-site",
        metavar="SITE",
        help="with the transcoders: the site to reconstruct (default: as --site)",
    )
    shape.add_argument(
        "--init-seed",
        type=counts,
        metavar="N,...",
        help=f"seeds of the initialisation {default(TrainConfig, 'init_seed')}",
    )
    shape.add_argument(
        "--init-from",
        metavar="SAE",
        help="SAE to start from, in any format that --sae of other verbs takes, with a new "
        "optimiser (default: random weights)",
    )
    _add_penalties(parser)
    work = parser.add_argument_group("training")
    work.add_argument(
        "--tokens",
        type=count,
        metavar="N",
        help=f"activations to train on {default(TrainConfig, 'tokens')}",
    )
    work.add_argument(
        "--batch-tokens",
        type=count,
        metavar="N",
        help="activations per step, of all processes together "
        f"{default(TrainConfig, 'batch_tokens')}",
    )
    work.add_argument(
        "--lr",
        type=number,
        metavar="X",
        help="peak learning rate (default: from the widths and the number of steps)",
    )
    work.add_argument(
        "--warmup-steps",
        type=count,
        metavar="N",
        help="steps of linear warm-up (default: a twentieth of the run, at most 1000)",
    )
    work.add_argument(
        "--beta1",
        type=number,
        metavar="X",
        help=f"Adam's decay of the mean of gradients {default(TrainConfig, 'beta1')}",
    )
    work.add_argument(
        "--decay-share",
        type=number,
        metavar="SHARE",
        help="share of the run, at its end, over which the learning rate falls to zero "
        f"{default(TrainConfig, 'decay_share')}",
    )
    work.add_argument(
        "--clip-norm",
        type=number,
        metavar="X",
        help="clip the norm of the whole gradient to X; costs one more pass over it (default: no "
        "clipping)",
    )
    work.add_argument(
        "--micro-batch-tokens",
        type=count,
        metavar="N",
        help="split a step into passes of N activations and add up their gradients (default: one "
        "pass)",
    )
    work.add_argument(
        "--moments",
        metavar="TYPE",
        help="how Adam's moments of the matrices are stored: float32, or bfloat16 with stochastic "
        "rounding "
        f"{default(TrainConfig, 'moments')}",
    )
    work.add_argument(
        "--cuda-graph",
        action="store_true",
        default=None,
        help="on a GPU, record a training step as a CUDA graph and replay it; faster for narrow "
        "SAEs",
    )
    work.add_argument(
        "--auxk",
        type=number,
        metavar="X",
        help="weight of the loss that revives dead latents; 0 switches it off "
        f"{default(TrainConfig, 'auxk')}",
    )
    work.add_argument(
        "--dead-after-tokens",
        type=count,
        metavar="N",
        help="a latent that has not fired for N tokens is dead (default: a quarter of --tokens, at "
        "most 10M)",
    )
    work.add_argument(
        "--held-out-share",
        type=number,
        metavar="SHARE",
        help="share of shards that are all needed, and of text that is read more than once, that "
        "is not trained on but measured at the end; 0 trains on all "
        f"{default(TrainConfig, 'held_out_share')}",
    )
    work.add_argument(
        "--buffer-tokens",
        type=count,
        metavar="N",
        help=f"size of the shuffle buffer, in activations {default(TrainConfig, 'buffer_tokens')}",
    )
    work.add_argument(
        "--checkpoint-every",
        type=count,
        metavar="N",
        help=f"activations between saved states {default(TrainConfig, 'checkpoint_every')}",
    )
    work.add_argument(
        "--keep-states",
        type=count,
        metavar="N",
        help="how many of the newest states stay in --out, besides the best one "
        f"{default(TrainConfig, 'keep_states')}",
    )
    work.add_argument(
        "--latent-shards",
        type=count,
        metavar="S",
        help="under torchrun: how many processes share the latents out, for an SAE that does not "
        "fit one; the others share each batch out "
        f"{default(TrainConfig, 'latent_shards')}",
    )
    work.add_argument(
        "--rank-timeout",
        type=count,
        metavar="SECONDS",
        help="under torchrun: how long processes wait for each other before they fail "
        f"{default(TrainConfig, 'rank_timeout')}",
    )
    work.add_argument(
        "--log-to",
        choices=("trackio", "wandb", "tensorboard", "none"),
        default="none",
        metavar="NAME",
        help="send the log to trackio, wandb or tensorboard as well, each with the extra of its "
        "name (default: none; metrics.jsonl and training.html are always written)",
    )
    work.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last saved state in --out, or start when there is none; with more "
        "--tokens a finished run goes on, too",
    )
    work.add_argument(
        "--dry-run",
        action="store_true",
        help="check the settings, say the memory and the bytes sent a step of each process, and "
        "write nothing",
    )
    add_common(
        parser,
        out="folder for the SAE, or for one folder per SAE when there are several (needed)",
        force="replace an earlier run in --out",
        dtype_help="arithmetic of the SAE, whose weights stay float32: auto, float32 or bfloat16 "
        "(default: auto, bfloat16 on a GPU, else float32); --lm-dtype is the language model's",
    )


def _add_penalties(parser: VerbParser) -> None:
    """The flags of architectures with a target for L0."""
    group = parser.add_argument_group("how --l0 is reached; thresholds: jumprelu, gemma-scope-2")
    group.add_argument(
        "--coefficient",
        type=number,
        metavar="X",
        help="where the penalty's coefficient starts, from which it is controlled (default: the "
        "architecture's own)",
    )
    group.add_argument(
        "--sparsity-warmup-steps",
        type=count,
        metavar="N",
        help="steps over which the coefficient rises from 0 (default: a twentieth of the run)",
    )
    group.add_argument(
        "--penalty",
        metavar="NAME",
        help=f"of thresholds: {', '.join(PENALTIES)} {default(JumpReLUConfig, 'penalty')}",
    )
    group.add_argument(
        "--bandwidth",
        type=number,
        metavar="X",
        help="width of the window in which a threshold learns "
        f"{default(JumpReLUConfig, 'bandwidth')}",
    )
    group.add_argument(
        "--threshold",
        type=number,
        metavar="X",
        help="where thresholds start (default: where about --l0 latents are active)",
    )
    group.add_argument(
        "--units",
        metavar="NAME",
        help="of the two above: sqrt_d for inputs of mean length sqrt(d_model), unit for length 1 "
        f"{default(JumpReLUConfig, 'units')}",
    )
    group.add_argument(
        "--to-input",
        action="store_true",
        default=None,
        help="let pairs in the window move the encoder, too (default: off)",
    )
    group.add_argument(
        "--log-threshold",
        action="store_true",
        default=None,
        help="train the logarithm of thresholds (default: off)",
    )
    group.add_argument(
        "--pre-act-loss",
        type=number,
        metavar="X",
        help="weight of the loss of pre-activations below their threshold "
        f"{default(JumpReLUConfig, 'pre_act_loss')}",
    )
    group.add_argument(
        "--frequency",
        type=number,
        metavar="X",
        help="weight of the penalty on latents that are active often (default: 0, with "
        "gemma-scope-2 0.05 / --l0)",
    )
    group.add_argument(
        "--frequency-knee",
        type=number,
        metavar="SHARE",
        help="share of tokens from which that grows faster "
        f"{default(JumpReLUConfig, 'frequency_knee')}",
    )


def _settings(args: Namespace) -> tuple[TrainConfig, list[str]]:
    """The config that the flags say, and what to say about a recipe."""
    details = given(args, JumpReLUConfig)
    settings = {
        "layers": args.layer or (),
        "text": TextConfig(**given(args, TextConfig)),
        **given(args, TrainConfig),
    }
    if args.recipe is not None:
        return with_recipe(args.recipe, settings, details)
    return TrainConfig(**settings, jumprelu=JumpReLUConfig(**details)), []


def run(args: Namespace) -> int:
    """Train, and say what came out."""
    if (args.model is None) == (args.activations is None):
        came = "neither" if args.model is None else "both"
        raise UsageError(
            f"--model (live training) or --activations (shards): give one of them, got {came}"
        )
    if args.dtype not in ("auto", "float32", "bfloat16"):
        raise UsageError(
            f"--dtype must be auto, float32 or bfloat16 for train, got {args.dtype}: it is the "
            "SAE's arithmetic; --lm-dtype is the language model's"
        )
    config, told = _settings(args)
    if args.activations is not None:
        _refuse_live_flags(args)
    elif not config.layers:
        raise UsageError("--layer is missing: the block to train on, such as --layer 20")
    if args.dry_run:
        from saesteer.cli.train_plan import show_plan

        return show_plan(args, config)
    need(args, "--out", "the folder for the SAE")
    from saesteer.sae.runs.processes import is_first

    first = is_first()  # under torchrun, only the first process prints and reserves the folder
    args.quiet = args.quiet or not first
    folder = reserved(
        args, locked=False, model=args.model, activations=args.activations, data=args.data
    )
    with folder if first else contextlib.nullcontext(), reporting(args) as report:
        check_reading(args)
        replies = reply_texts(args)
        from saesteer.sae import train
        from saesteer.sae.training.architectures import check_settings

        check_settings(config)
        for line in told:
            report.say(one_line(line))
        warn: Callable[[str], None] = report.warn if first else lambda message: None

        lm = None
        if args.activations is None:
            lm = open_model(args, report, dtype=args.lm_dtype or "auto")
        runs = train(
            args.out,
            config,
            model=lm,
            activations=args.activations,
            replies=replies,
            device=args.device,
            resume=args.resume,
            force=args.force,
            consume_model=True,
            log_to=args.log_to,
            progress=report,
            say=report.say,
            warn=warn,
        )
    if args.json and first:
        print_json({"runs": runs})
    elif first:
        _print_summary(args, runs)
    return 0


def _refuse_live_flags(args: Namespace) -> None:
    for name in _LIVE_ONLY:
        if getattr(args, name) not in (None, False):
            raise UsageError(
                f"--{name.replace('_', '-')} needs --model: the shards of --activations hold the "
                "text they were made from"
            )


def _print_summary(args: Namespace, runs: Sequence[Document]) -> None:
    rows = []
    own = [name for name in runs[0]["sae"] if name not in _OF_EVERY_SAE]
    # As their files compute, on rows that were not trained on.
    judged = any("fvu_heldout" in run["sae"] for run in runs)
    for run in runs:
        sae, final = run["sae"], run["final"]
        rows.append(
            [
                "+".join(str(layer) for layer, _ in sae.get("places", [[sae["layer"], ""]]))
                + (f" to {sae['to_layer']}" if "to_layer" in sae else ""),
                str(sae["d_sae"]),
                *(str(sae[name]) for name in own),
                str(sae["init_seed"]),
                amount(final.get("tokens", 0)),
                figure(final.get("fvu")),
                *([figure(sae.get("fvu_heldout"))] if judged else []),
                figure(final.get("l0")),
                *([figure(sae.get("l0_heldout"))] if judged else []),
                figure(final.get("dead_fraction")),
                duration(run["seconds"]),
                run["folder"],
            ]
        )
    both = ["FVU", "held-out FVU", "L0", "held-out L0"] if judged else ["FVU", "L0"]
    measured = ["tokens", *both, "dead", "time", "folder"]
    print_table(["layer", "d_sae", *own, "seed", *measured], rows, left="folder")
    model = args.model or runs[0]["model"].get("name") or "MODEL"
    folder = Path(runs[0]["folder"])
    print_next("metrics", "--sae", folder, "--model", model, "--data", "HELD-OUT-TEXT")
