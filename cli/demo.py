"""`saesteer demo`: harvest, train SAEs and find plans for some tasks on a small instruct model."""

import shlex
import sys
import textwrap
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from saesteer.checkpoints.files import claim_output
from saesteer.checkpoints.model_files import DEFAULT_MODEL, WHEEL_ALIAS
from saesteer.cli.flags import add_common, add_open, add_thinking
from saesteer.cli.output import (
    Document,
    amount,
    duration,
    paint,
    print_json,
    print_page,
    print_table,
    program,
)
from saesteer.cli.parser import Repeated, VerbParser
from saesteer.cli.progress import reporting

if TYPE_CHECKING:
    from saesteer.steering.demonstration.pipeline import Demo, Stage

EXAMPLE = "saesteer demo --quick -o runs/first"
EXAMPLES = 2


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    group = parser.add_argument_group("demo")
    group.add_argument("--model", metavar="NAME", help=f"language model (default: {DEFAULT_MODEL})")
    group.add_argument(
        "--task",
        action=Repeated,
        nargs="+",
        metavar="NAME",
        help="built-in instructions, or task.yaml files, to steer by; repeatable (default: "
        "question, french and json; with --quick question)",
    )
    add_thinking(group)
    group.add_argument("--quick", action="store_true", help="about a third of the work")
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python files that come with the model (default: none is ever run)",
    )
    add_open(group)
    add_common(
        parser,
        out="folder for everything that is made (default: runs/demo-<time>)",
        force="replace what an earlier demo left in --out",
    )


def run(args: Namespace) -> int:
    """Run the stages, print what each found, and end with the page."""
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
            [name for names in args.task or () for name in names],
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
        _print_end(demo, args.model, show=args.open)
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


def _print_find(demo: "Demo", stage: "Stage", facts: Document) -> None:
    from saesteer.steering.grades.grade import GRADES
    from saesteer.steering.reports.find_page import arm_words, damage_words, interval_words

    document = demo.found[-1]
    arms = facts["arms"]
    shown = [name for name in _SIDE_BY_SIDE if name in arms]
    for i in range(min(EXAMPLES, len(arms[shown[0]]["samples"]))):
        _say(f"   {paint(arms[shown[0]]['samples'][i]['content'], 'cyan')}")
        for name in shown:
            sample = arms[name]["samples"][i]
            passed = ", ".join(grade for grade in GRADES if sample[grade]) or "passes nothing"
            _say(f"   {paint(arm_words(name), 'bold')} [{passed}]")
            text = " ".join(sample["answer"].split()) or "(nothing)"
            _say(textwrap.indent(textwrap.fill(text, 92), "      "))
        _say()
    rows = [
        [arm_words(name), *(interval_words(arm[grade]) for grade in GRADES)]
        for name, arm in arms.items()
    ]
    n = next(iter(arms.values()))["n"]
    # Figures of de-quantised weights are not those of the original model.
    weights = ", de-quantised 4-bit weights" if demo.lm.name == WHEEL_ALIAS else ""
    _say(f"   on {n} test contents{weights}; 95 % Wilson intervals")
    _table(["arm", *GRADES], rows, "arm")
    _say(f"   setting: {_says(document)}")
    latents = facts["latents"]
    if latents is not None:
        kept = latents["effect_kept"]
        share = "no effect to keep" if kept is None else f"{kept:.0%} of the directions' effect"
        _say(f"   in latents: {latents['latents']} of both phases keep {share}")
        for layer in latents["layers"]:
            held = layer["replies"]
            named = [
                f"{number} {' '.join(repr(token) for token in lens[:3])}"
                for number, lens in zip(held["latents"], held["lens"], strict=False)
            ]
            _say(f"      layer {layer['layer']}, replies: {'; '.join(named[:3])}")
    for name in document["damage"]:
        _say(f"   unrelated questions: {damage_words(document, name)}")
    for problem in facts["over_budget"]:
        _say(paint(f"   OVER BUDGET: {problem}", "red"))


def _print_latents(demo: "Demo", stage: "Stage", facts: Document) -> None:
    for name, pages in facts.items():
        if isinstance(pages, dict):
            _say(f"   {name}: {pages['latents']} latents, {pages['folder']}/index.html")


def _says(document: Document) -> str:
    """The setting that was chosen, in words."""
    final = [row for row in document["tried"] if row["setting"] == document["setting"]]
    return str(final[-1]["says"])


_SIDE_BY_SIDE = ("unsteered", "prompted", "steered", "steered_latents")

_PRINT: dict[str, Callable[["Demo", "Stage", Document], None]] = {
    "model": _print_model,
    "harvest": _print_harvest,
    "train": _print_train,
    "find": _print_find,
    "latents": _print_latents,
}


def _print_end(demo: "Demo", model: str | None, *, show: bool) -> None:
    """Success and damage of every task, what the grades mean, what to do next, and the page."""
    from saesteer.steering.grades.grade import DEFINITIONS
    from saesteer.steering.reports.find_page import verdict

    _say(f"\n{paint('Success and damage', 'bold')}")
    for document in demo.found:
        text, bad = verdict(document)
        line = textwrap.fill(f"{document['task']['name']}: {text}", 92, subsequent_indent="   ")
        _say(paint(line, "red") if bad else line)
    _say()
    for name, meaning in DEFINITIONS.items():
        _say(textwrap.fill(f"{name}: {meaning}", 92, subsequent_indent="   "))
    seconds = demo.document["seconds"]
    _say(f"\nAll of it took {duration(seconds)}; every artefact is in {demo.out}.")
    task = demo.tasks[0]
    content = shlex.quote(task.contents["test"][0])
    given = f" --model {model}" if model else ""
    _say(
        f"{paint('next:', 'cyan')} {program()} steer{given} --plan {demo.plan_folder(task)} "
        f"-p {content} --baseline"
    )
    print_page(demo.out / demo.document["page"], show=show)
