"""`saesteer patch`: which token, block, head or latent carries a difference between two prompts."""

import dataclasses
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saesteer.checkpoints.errors import UsageError
from saesteer.cli.flags import (
    PAIRS_DTYPE_HELP,
    add_common,
    add_model,
    add_pairs,
    default,
    given,
    need,
)
from saesteer.cli.inputs import exact_dtype, open_model, open_sae, reserved, take_folder
from saesteer.cli.output import print_json, print_next, write_run
from saesteer.cli.parser import VerbParser
from saesteer.cli.patch_output import print_grid, print_latents, print_vectors
from saesteer.cli.progress import Report, reporting
from saesteer.cli.values import count, counts, layers, names, numbers
from saesteer.cli.values import number as a_number
from saesteer.mechanisms.config import (
    FAST,
    HEAD_SITES,
    METRICS,
    RESIDUAL_SITES,
    TAKEN,
    LatentConfig,
    PatchConfig,
    VectorConfig,
)

EXAMPLE = (
    "saesteer patch --model runs/hand/model --pairs runs/hand/scenes.jsonl --site z "
    "--at last,object -o runs/patch"
)
NEEDED = "--pairs FILE"
_BELONGS = {
    "site": ("grid", "latents", "vector in latents"),
    "head": ("grid",),
    "fast": ("grid",),
    "checks": ("grid",),
    "ig_steps": ("grid",),
    "resume": ("grid",),
    "verify": ("grid", "latents", "vector in latents"),
    "at": ("grid", "latents", "vector", "vector in latents"),
    "direction": ("grid", "latents"),
    "budget": ("grid", "vector", "vector in latents"),
    "iv_from": ("vector", "vector in latents"),
    "sets": ("vector",),
    "doses": ("vector",),
    "plan": ("vector",),
    "scope": ("vector", "latents", "vector in latents"),
    "share": ("latents", "vector in latents"),
    "most": ("latents", "vector in latents"),
    "compare": ("latents", "vector in latents"),
    "tuned": ("latents",),
}
"""Which flag is for what: a grid of nodes, cut attention (nothing here), --vector, --sae."""
_MODES = {
    "grid": "patches of nodes",
    "vector": "--vector",
    "latents": "--sae",
    "vector in latents": "--vector with --sae",
}


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    data = parser.add_argument_group("pairs")
    add_model(data)
    add_pairs(data, makers="boxes:N, contrast:adjectives, contrast:animals, task:NAME", n=100)
    data.add_argument(
        "--against",
        metavar="TASK",
        help="with task:NAME: another task on the same contents (default: the contents alone)",
    )
    data.add_argument(
        "--allow-copies",
        action="store_true",
        default=None,
        help="accept answers that begin with the query's own token",
    )
    grid = parser.add_argument_group("grid")
    grid.add_argument(
        "--site",
        type=names,
        metavar="SITE,...",
        help=f"what is patched: {', '.join((*RESIDUAL_SITES, *HEAD_SITES))} "
        f"{default(PatchConfig, 'sites')}",
    )
    grid.add_argument(
        "--at",
        type=names,
        metavar="NAME,...",
        help="positions: first, last, a name of the pairs (NAME-first, NAME-last), or all "
        f"{default(PatchConfig, 'at')}; with --vector {default(VectorConfig, 'at')}",
    )
    grid.add_argument("--layer", type=layers, metavar="L,...", help="blocks (default: all)")
    grid.add_argument("--head", type=counts, metavar="H,...", help="query heads (default: all)")
    grid.add_argument(
        "--direction",
        choices=("noise", "denoise"),
        metavar="WAY",
        help="noise: corrupt values into the clean run; denoise: clean values into the corrupt run "
        f"{default(PatchConfig, 'direction')}",
    )
    grid.add_argument(
        "--metric",
        choices=METRICS,
        metavar="NAME",
        help=f"{', '.join(METRICS)} (default: logit-diff where pairs have a wrong answer, else "
        "logprob)",
    )
    work = parser.add_argument_group("work")
    work.add_argument(
        "--fast",
        choices=FAST,
        metavar="HOW",
        help="estimate by gradients: atp, atp* or ig; some nodes are patched exactly as well, to "
        "show how far off it is (default: exact)",
    )
    work.add_argument(
        "--verify",
        type=count,
        metavar="N",
        help="with --fast: largest nodes to patch exactly, with --sae: latents "
        f"{default(PatchConfig, 'verify')}",
    )
    work.add_argument(
        "--checks",
        type=count,
        metavar="N",
        help="with --fast: more nodes to patch exactly, over quantiles "
        f"{default(PatchConfig, 'checks')}",
    )
    work.add_argument(
        "--ig-steps",
        type=count,
        metavar="N",
        help=f"with --fast ig: points of the line {default(PatchConfig, 'ig_steps')}",
    )
    work.add_argument(
        "--budget",
        type=a_number,
        metavar="MINUTES",
        help="refuse a grid that would take longer, as predicted from its first batches "
        f"{default(PatchConfig, 'budget_minutes')}",
    )
    work.add_argument(
        "--resume",
        action="store_true",
        default=None,
        help="go on with the grid in --out after its last finished pair",
    )
    _add_readings(parser)
    add_common(
        parser,
        out="folder for report.json, report.html, the effects, plan/ and run.json (default: print "
        "only)",
        force="replace earlier results in --out",
        seed_help="seed of the pairs that are made and of resampling (default: 0)",
        dtype_help=PAIRS_DTYPE_HELP,
    )


def _add_readings(parser: VerbParser) -> None:
    cut = parser.add_argument_group("attention knock-out")
    cut.add_argument(
        "--knock",
        type=names,
        metavar="FROM:TO,...",
        help="instead of patches: cut attention from token TO to token FROM in blocks 0..l, for "
        "each block l, such as object:last (default: none)",
    )
    vector = parser.add_argument_group("instruction vectors")
    vector.add_argument(
        "--vector",
        action="store_true",
        help="put the state of the instruction's last token into the prompt without it, by layer; "
        "with --out, the mean vector becomes a plan for steer and evaluate",
    )
    vector.add_argument(
        "--sets",
        type=count,
        metavar="N",
        help="layers at once: 1, 2 (all pairs as well) or 3 (triples of the best eight as well) "
        f"{default(VectorConfig, 'sets')}",
    )
    vector.add_argument(
        "--iv-from",
        choices=TAKEN,
        metavar="RUN",
        help="alone: the state is taken from a run of the instruction alone; full: of the whole "
        f"prompt {default(VectorConfig, 'taken')}",
    )
    vector.add_argument(
        "--doses",
        type=numbers,
        metavar="X,...",
        help="add these shares of the difference of the states (default: put the state in place)",
    )
    vector.add_argument(
        "--plan",
        type=count,
        metavar="L",
        help="block whose vector is written to plan/ (default: that of the largest effect)",
    )
    vector.add_argument(
        "--scope",
        metavar="SCOPE",
        help="with --vector or --sae: positions that the plan steers (default: generation)",
    )
    latents = parser.add_argument_group("latents")
    latents.add_argument(
        "--sae",
        metavar="DIR",
        help="patch latents of this SAE at its site, its error a node of its own; with --vector, "
        "the instruction's state in latents; with --out, the fewest latents become a plan",
    )
    latents.add_argument(
        "--tuned",
        metavar="MODEL",
        help="with --sae: put a tuned model's latents, on the clean prompts, into --model "
        "(default: those of the pair's other run)",
    )
    latents.add_argument(
        "--share",
        type=a_number,
        metavar="X",
        help="share of the site's effect that these have to bring "
        f"{default(LatentConfig, 'share')}",
    )
    latents.add_argument(
        "--most",
        type=count,
        metavar="N",
        help=f"most latents together {default(LatentConfig, 'most')}",
    )
    latents.add_argument(
        "--compare",
        type=names,
        metavar="PLAN,...",
        help="plans of rank or find, whose latents are patched beside (default: none)",
    )


def run(args: Namespace) -> int:
    """Patch, and print the largest effects."""
    need(args, "--pairs", "pairs of prompts, or a maker such as contrast:animals")
    mode = _mode(args)
    if args.resume:
        need(args, "--out", "the folder of the grid to go on with")
    args.resume = bool(args.resume)
    run_mode = {"grid": _grid, "cut": _cut, "vector": _vector}.get(mode, _latents)
    inputs = {name: getattr(args, name) for name in ("model", "pairs", "sae", "compare", "tuned")}
    with reserved(args, **inputs), reporting(args) as report:
        document = run_mode(args, report)
        for text in document["warnings"]:
            report.warn(text)
    if args.json:
        print_json(document)
        return 0
    if mode in ("grid", "cut"):
        print_grid(document)
    elif mode == "vector":
        print_vectors(document)
    else:
        print_latents(document)
    if args.out is not None:
        print(f"written to {args.out / 'report.html'}")
        if (args.out / "plan").is_dir():
            print_next("steer", "--plan", args.out / "plan", "-p", "...")
    return 0


def _mode(args: Namespace) -> str:
    """Which of the questions is asked. Raises UsageError for flags of another one."""
    if args.knock is not None and (args.vector or args.sae is not None):
        other = "--vector" if args.vector else "--sae"
        raise UsageError(f"--knock cuts attention and {other} patches states: give one of them")
    if args.vector:
        mode = "vector" if args.sae is None else "vector in latents"
    else:
        mode = "grid" if args.sae is None else "latents"
    mode = "cut" if args.knock is not None else mode
    for flag, modes in _BELONGS.items():
        if getattr(args, flag) is not None and mode not in modes:
            where = ", ".join(_MODES[one] for one in modes)
            raise UsageError(
                f"--{flag.replace('_', '-')} belongs to {where}: leave it out, or change the rest"
            )
    return mode


def _patch_config(args: Namespace) -> PatchConfig:
    flags = {"sites": "site", "layers": "layer", "heads": "head", "budget_minutes": "budget"}
    return PatchConfig(**given(args, PatchConfig, **flags))


def _vector_config(args: Namespace) -> VectorConfig:
    flags = {"taken": "iv_from", "layers": "layer", "budget_minutes": "budget"}
    values = given(args, VectorConfig, **flags)
    if args.at is not None:
        if len(args.at) != 1:
            raise UsageError(f"--at takes one position with --vector, got {','.join(args.at)}")
        values["at"] = args.at[0]
    return VectorConfig(**values)


def _opened(args: Namespace, report: Report, seed: int, at: tuple[str, ...]) -> tuple[Any, Any]:
    """The model and the pairs; positions are checked before the model is loaded."""
    from saesteer.mechanisms import load_pairs
    from saesteer.mechanisms.data.pairs import check_positions

    pairs = load_pairs(args.pairs, n=args.n, against=args.against, seed=seed)
    check_positions(pairs, at, "at")
    lm = open_model(args, report, dtype=exact_dtype(args))
    return lm, pairs


def _made(args: Namespace) -> bool:
    """Whether pairs come from a maker: those that cannot be scored are left out."""
    return not Path(args.pairs).is_file()


def _grid(args: Namespace, report: Report) -> dict[str, Any]:
    from saesteer.mechanisms import patch, save_patch
    from saesteer.mechanisms.patching.finished import FinishedPairs

    config = _patch_config(args)
    lm, pairs = _opened(args, report, config.seed, config.at)
    finished = None

    def begin() -> None:
        take_folder(args)
        write_run(args.out, "patch", vars(args))

    if args.out is not None:
        finished = FinishedPairs(args.out, begin)
    result = patch(lm, pairs, config, drop=_made(args), finished=finished, resume=args.resume,
                   progress=report)  # fmt: skip
    if finished is None:
        return result.document()
    document = save_patch(args.out, result)
    write_run(args.out, "patch", vars(args), model=document["model"])
    finished.remove()
    return document


def _cut(args: Namespace, report: Report) -> dict[str, Any]:
    from saesteer.mechanisms import knock_out, save_patch

    edges = []
    for edge in args.knock:
        source, colon, target = edge.partition(":")
        if not (source and colon and target):
            raise UsageError(f"--knock must be FROM:TO, such as object:last, got {edge!r}")
        edges.append((source, target))
    config = _patch_config(args)
    lm, pairs = _opened(args, report, config.seed, tuple(x for edge in edges for x in edge))
    result = knock_out(lm, pairs, edges, config, drop=_made(args), progress=report)
    if args.out is None:
        return result.document()
    document = save_patch(take_folder(args), result)
    write_run(args.out, "patch", vars(args), model=document["model"])
    return document


def _task(args: Namespace) -> Any:
    """The task of `task:NAME`, for the plan: evaluate grades by it."""
    kind, _, name = str(args.pairs).partition(":")
    if kind != "task":
        return None
    from saesteer.steering.plans.plan import TaskIdentity
    from saesteer.steering.tasks.task import load_task

    task = load_task(name)
    return TaskIdentity(task.name, task.hash, task.wordings)


def _vector(args: Namespace, report: Report) -> dict[str, Any]:
    from saesteer.mechanisms import instruction_vectors, save_vectors

    config = _vector_config(args)
    # Positions are those of the prompt without its instruction: they are checked there.
    lm, pairs = _opened(args, report, config.seed, ())
    result = instruction_vectors(lm, pairs, config, drop=_made(args), progress=report)
    if args.out is None:
        return result.document()
    plan = result.plan(lm, args.plan, scope=args.scope or "generation", task=_task(args))
    document = save_vectors(take_folder(args), result)
    _save_plans(args, document, {"plan": plan})
    return document


def _latents(args: Namespace, report: Report) -> dict[str, Any]:
    from saesteer.mechanisms import instruction_vectors, patch_latents, save_latents
    from saesteer.steering.plans.plan_file import load_plan

    runs = _vector_config(args) if args.vector else _patch_config(args)
    config = LatentConfig(**given(args, LatentConfig))
    if args.layer is not None and len(args.layer) != 1:
        raise UsageError(f"--layer is the SAE's block with --sae, got {len(args.layer)} of them")
    if args.site is not None and len(args.site) != 1:
        raise UsageError(f"--site is the SAE's with --sae, got {','.join(args.site)}")
    args.layer = None if args.layer is None else args.layer[0]
    args.site = None if args.site is None else args.site[0]
    others = {
        Path(name).name: [latent.id for part in load_plan(name).parts for latent in part.latents]
        for name in args.compare or ()
    }
    sae = open_sae(args, report)
    lm, pairs = _opened(args, report, runs.seed, runs.at if isinstance(runs, PatchConfig) else ())
    if args.tuned is not None:
        return _tuned(args, report, lm, pairs, sae, runs, config)
    result = patch_latents(
        lm, pairs, sae, runs, config, layer=args.layer, site=args.site, others=others,
        drop=_made(args), progress=report,
    )  # fmt: skip
    if args.out is None:
        return result.document()
    scope, task = args.scope or "generation", _task(args)
    plans = {"plan": result.plan(lm, sae, scope=scope, task=task)}
    if isinstance(runs, VectorConfig) and result.sae["site"] == "resid_post":
        layer = result.sae["layer"]
        whole = instruction_vectors(
            lm, pairs, dataclasses.replace(runs, layers=(layer,), controls=False),
            drop=_made(args), progress=report,
        )  # fmt: skip
        plans["plan-vector"] = whole.plan(lm, layer, scope=scope, task=task)
    document = save_latents(take_folder(args), result)
    _save_plans(args, document, plans)
    return document


def _tuned(
    args: Namespace, report: Report, lm: Any, pairs: Any, sae: Any, *how: Any
) -> dict[str, Any]:
    from saesteer.mechanisms import compare_latents, save_latents

    result, diff = compare_latents(
        lm, args.tuned, pairs, sae, *how, layer=args.layer, site=args.site, device=args.device,
        dtype=str(lm.dtype).removeprefix("torch."), drop=_made(args), progress=report,
    )  # fmt: skip
    if args.out is None:
        return {**result.document(), "diff": diff.document()}
    document = save_latents(take_folder(args), result, diff)
    write_run(args.out, "patch", vars(args), model=document["model"])
    return document


def _save_plans(args: Namespace, document: dict[str, Any], plans: Mapping[str, Any]) -> None:
    from saesteer.steering.plans.plan_file import save_plan

    for name, plan in plans.items():
        save_plan(plan, args.out / name)
    write_run(args.out, "patch", vars(args), model=document["model"])
