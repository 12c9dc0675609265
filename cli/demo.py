"""`saesteer demo`: harvest, train, rank, choose doses and evaluate on a small instruct model."""

import sys
import textwrap
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from saesteer.checkpoints.files import claim_output
from saesteer.checkpoints.model_files import DEFAULT_MODEL, WHEEL_ALIAS
from saesteer.cli.flags import add_common, add_thinking
from saesteer.cli.output import (
    Document,
    amount,
    duration,
    number,
    paint,
    print_json,
    print_table,
    program,
    with_flags,
)
from saesteer.cli.parser import VerbParser
from saesteer.cli.progress import reporting

if TYPE_CHECKING:
    from saesteer.steering.demonstration.pipeline import Demo, Stage
    from saesteer.steering.evaluation.graded_arms import Arm

EXAMPLE = "saesteer demo --quick -o runs/first"
EXAMPLES = 3


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    group = parser.add_argument_group("demo")
    group.add_argument("--model", metavar="NAME", help=f"language model (default: {DEFAULT_MODEL})")
    group.add_argument(
        "--task",
        metavar="NAME",
        default="french",
        help="the built-in instruction to find and steer by (default: french)",
    )
    add_thinking(group)
    group.add_argument("--quick", action="store_true", help="about a third of the work")
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python files that come with the model (default: none is ever run)",
    )
    add_common(
        parser,
        out="folder for everything that is made (default: runs/demo-<time>)",
        force="replace what an earlier demo left in --out",
    )


def run(args: Namespace) -> int:
    """Run the stages, and print what each found."""
    out = Path(args.out or f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}")
    claim_output(out, force=args.force)
    from saesteer.steering.checks.words import keeping_thoughts

    with keeping_thoughts(not args.strip_thinking), reporting(args) as progress:
        from saesteer.sae.model.language_model import LanguageModel, load_model
        from saesteer.steering.demonstration.pipeline import FULL, QUICK, Demo

        model: str | LanguageModel = args.model or DEFAULT_MODEL
        if args.trust_remote_code:
            model = load_model(
                str(model), device=args.device, dtype=args.dtype, trust_remote_code=True
            )
        demo = Demo(
            out,
            args.task,
            model=model,
            size=QUICK if args.quick else FULL,
            seed=args.seed or 0,
            device=args.device,
            dtype=args.dtype,
            progress=progress,
            warn=progress.warn,
        )
        for number_of_stage, stage in enumerate(demo.stages(), 1):
            if not args.json:
                _say(f"\n{paint(f'{number_of_stage}. {stage.name}', 'bold')}  {stage.what}")
            if stage.kind == "model":
                progress.say(f"loading {model if isinstance(model, str) else model.name}")
            facts = stage.run()
            progress.end()
            if not args.json:
                _PRINT[stage.kind](demo, stage, facts)
                _say(paint(f"   took {duration(facts['seconds'])}", "dim"))
        document = demo.finish()
    if args.json:
        print_json(document)
    else:
        _print_end(demo, args.model)
    return 0


def _say(text: str = "") -> None:
    """Print a line of the result at once, because the next stage may take minutes."""
    # `reporting` redirects sys.stdout to stderr; results belong on the real stdout.
    print(text, file=sys.__stdout__, flush=True)


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: str) -> None:
    print_table(headers, rows, left, indent=3, stream=sys.__stdout__)


# --- what each stage prints ----------------------------------------------------------------------


def _print_model(demo: "Demo", stage: "Stage", facts: Document) -> None:
    lm = demo.lm
    _say(
        f"   {lm.name}: {lm.n_layers} blocks, d_model {lm.d_model}, {facts['dtype']} on "
        f"{lm.device}, weights {lm.fingerprint}"
    )


def _print_harvest(demo: "Demo", stage: "Stage", facts: Document) -> None:
    excluded = facts["excluded"]
    _say(
        f"   {amount(facts['tokens'])} activations per layer at "
        f"{amount(facts['tokens_per_second'])} tokens/s; left out: {amount(excluded['special'])} "
        f"special tokens, {amount(excluded['sinks'])} attention sinks"
    )


def _print_train(demo: "Demo", stage: "Stage", facts: Document) -> None:
    rows = []
    for layer, folder in demo.sae_folders.items():
        final = facts[f"layer {layer}"]
        dead = f"{100 * final['dead_fraction']:.1f} %"
        rows.append([str(layer), f"{final['fvu']:.3f}", f"{final['l0']:.1f}", dead, folder])
    _table(["layer", "FVU", "L0", "dead latents", "folder"], rows, "folder")


def _print_rank(demo: "Demo", stage: "Stage", facts: Document) -> None:
    if used := facts.get("replies_used"):
        _say(f"   {used[0]} of {used[1]} instructed replies pass the check and count")
    rows = [
        [
            str(latent["id"]),
            *(number(latent[key], 3) for key in ("score", "mu", "sigma")),
            " ".join(repr(token) for token in latent["lens"]),
        ]
        for latent in facts["latents"][:5]
    ]
    _table(["latent", "score", "mu", "sigma", "lens tokens"], rows, "lens tokens")


def _print_dose(demo: "Demo", stage: "Stage", facts: Document) -> None:
    from saesteer.steering.grades.grade import GRADES

    trials = facts["trials"]
    final = [row for row in trials if row["n"] == trials[-1]["n"]]
    final.sort(key=lambda row: (-row["success"]["value"], -row["follows"][0]))
    rows = [
        [
            str(row["k"]),
            number(row["scale"]),
            row["scope"],
            f"{row['relative_dose']:.2f}",
            *("–" if row[name] is None else f"{row[name][0]:.2f}" for name in GRADES),
            str(row["n"]),
        ]
        for row in final
    ]
    headers = ["k", "scale", "scope", "||delta||/||h||", *GRADES, "contents"]
    _table(headers, rows, "scope")
    assert stage.setting is not None
    chosen = facts["chosen"]
    _say(
        f"   chosen: k {chosen['k']}, scale {chosen['scale']:g}, scope {chosen['scope']}; written "
        f"to {demo.plan_folder(stage.setting)}"
    )


def _print_evaluation(demo: "Demo", stage: "Stage", facts: Document) -> None:
    from saesteer.steering.reports.evaluation_report import grade_words

    arms = demo.sampled
    _say(f"\n{paint('Side by side', 'bold')}  (the first {EXAMPLES} test contents)")
    for i in range(min(EXAMPLES, len(arms[0].answers))):
        _say(f"\n   {paint(arms[0].answers[i].content, 'cyan')}")
        for arm in arms:
            graded = arm.answers[i]
            _say(f"   {paint(arm.name, 'bold')} [{grade_words(graded.row())[1]}]")
            text = " ".join(graded.output.split()) or "(nothing)"
            _say(textwrap.indent(textwrap.fill(text, 92), "      "))
    _print_rates(demo, "sampled, temperature 0.7", arms)
    if demo.greedy:
        _print_rates(demo, "greedy, the same doses", demo.greedy)


def _print_rates(demo: "Demo", decoding: str, arms: "Sequence[Arm]") -> None:
    from saesteer.steering.grades.grade import GRADES

    # Figures of de-quantised weights are not those of the original model.
    weights = ", de-quantised 4-bit weights" if demo.lm.name == WHEEL_ALIAS else ""
    about = f"{demo.lm.name}{weights}; {decoding}; 95 % Wilson intervals"
    _say(f"\n{paint('Rates', 'bold')}  ({about})")
    rows = [[arm.name, *(str(arm.rate(name) or "–") for name in GRADES)] for arm in arms]
    _table(["arm", *GRADES], rows, "arm")


_PRINT: dict[str, Callable[["Demo", "Stage", Document], None]] = {
    "model": _print_model,
    "harvest": _print_harvest,
    "train": _print_train,
    "rank": _print_rank,
    "choose dose": _print_dose,
    "evaluate": _print_evaluation,
}


def _print_end(demo: "Demo", model: str | None) -> None:
    """What the figures mean, and what to do next."""
    from saesteer.steering.grades.grade import DEFINITIONS

    _say()
    for name, meaning in DEFINITIONS.items():
        _say(textwrap.fill(f"{name}: {meaning}", 92, subsequent_indent="   "))
    arm = demo.sampled[0]
    for name, why in arm.not_graded.items():
        _say(f"{name}: {with_flags(why)}")
    unsteered, prompted, steered = (one.success.value for one in demo.sampled[:3])
    _say(
        f"Success ({arm.measure}): steered {steered:.2f}, prompted {prompted:.2f}, unsteered "
        f"{unsteered:.2f}."
    )
    seconds = demo.document["seconds"]
    _say(f"\nAll of it took {duration(seconds)}; every artefact is in {demo.out}.")
    given = f" --model {model}" if model else ""
    _say(
        f"{paint('next:', 'cyan')} {program()} steer{given} --plan "
        f"{demo.plan_folder(demo.settings[0])} -p 'The bridge was closed for the winter.' "
        "--baseline --temperature 0.7"
    )
