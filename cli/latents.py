"""`saesteer latents`: pages of what the latents of an SAE are."""

from argparse import Namespace
from typing import TYPE_CHECKING

from saesteer.checkpoints.errors import UsageError
from saesteer.cli.flags import add_common, add_documents, add_sae, add_text, default, given, need
from saesteer.cli.inputs import check_reading, open_model, open_sae, reserved, take_folder
from saesteer.cli.output import Document, amount, number, print_json, print_table, write_run
from saesteer.cli.parser import Repeated, VerbParser
from saesteer.cli.progress import reporting
from saesteer.cli.values import count, counts
from saesteer.cli.values import number as a_number
from saesteer.sae.config import TextConfig
from saesteer.sae.reading.config import LatentsConfig

if TYPE_CHECKING:
    from saesteer.checkpoints.sae_file import SAE
    from saesteer.sae.reading.describe import Describer
    from saesteer.sae.reading.result import Latents

EXAMPLE = (
    "saesteer latents --sae runs/sae --model smollm2-135m-instruct --data held-out.jsonl "
    "--plan runs/plan --tokens 100k -o runs/latents"
)
NEEDED = "--sae DIR -o DIR"
_SHOWN = 12


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    what = parser.add_argument_group("SAE and model")
    add_sae(what)
    which = parser.add_argument_group("which latents: one of these")
    which.add_argument(
        "--ids", type=counts, metavar="ID,...", help="these latents (default: see --top)"
    )
    which.add_argument(
        "--plan", metavar="DIR", help="the latents of a plan, which also counts as a ranking"
    )
    which.add_argument(
        "--top",
        type=count,
        metavar="N",
        help="the N latents that write most: by the sum of |activation| times the length of the "
        f"decoder row {default(LatentsConfig, 'top')}",
    )
    which.add_argument("--all", action="store_true", help="every latent, also those never active")
    text = parser.add_argument_group("text")
    add_text(text, epochs=False, replies=False)
    add_documents(text)
    text.add_argument(
        "--tokens",
        type=count,
        metavar="N",
        help=f"read at least N tokens, in whole batches {default(LatentsConfig, 'tokens')}",
    )
    page = parser.add_argument_group("pages")
    page.add_argument(
        "--contexts",
        type=count,
        metavar="N",
        help=f"strongest contexts of each latent {default(LatentsConfig, 'contexts')}",
    )
    page.add_argument(
        "--rankings",
        action=Repeated,
        metavar="DIR",
        help="folder of a ranking or a plan; pages name those that hold the latent; repeatable "
        "(default: that of --plan)",
    )
    page.add_argument(
        "--describe",
        metavar="URL",
        help="OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1, that is asked for "
        "descriptions and to judge them on held-out text (default: none; every latent has a "
        "description of its most telling tokens)",
    )
    page.add_argument(
        "--describe-model", metavar="NAME", help="the model's name there (needed with --describe)"
    )
    page.add_argument(
        "--steer",
        type=count,
        metavar="N",
        help="steer a neutral prompt with the first N latents, one by one; 0: none "
        f"{default(LatentsConfig, 'steer')}",
    )
    page.add_argument(
        "--dose",
        type=a_number,
        metavar="X",
        help="with --steer: length of what is added, over that of the activation "
        f"{default(LatentsConfig, 'dose')}",
    )
    page.add_argument(
        "--neutral-prompt",
        metavar="TEXT",
        help=f'with --steer: what is continued (default: "{LatentsConfig().neutral_prompt}")',
    )
    export = parser.add_argument_group("export for Neuronpedia")
    export.add_argument(
        "--np-model", metavar="ID", help="the model's id there (default: made from its name)"
    )
    export.add_argument(
        "--np-set",
        metavar="ID",
        help="id of the source set, without the layer (default: saesteer-SITE-WIDTH)",
    )
    export.add_argument("--np-creator", metavar="NAME", help="who made the SAE (default: unknown)")
    add_common(
        parser,
        out="folder for index.html, a page for each latent, latents.jsonl, latents.json and "
        "neuronpedia/ (needed)",
        force="accept a model with other weights than the SAE was trained on; replace results in "
        "--out",
    )


def run(args: Namespace) -> int:
    """Read, write the pages, and print the first latents."""
    need(args, "--sae", "the SAE whose latents are shown, a folder or RELEASE:ID")
    need(args, "--out", "the folder for the pages")
    chosen = [
        flag
        for flag, given_it in (
            ("--ids", args.ids is not None),
            ("--plan", args.plan is not None),
            ("--top", args.top is not None),
            ("--all", args.all),
        )
        if given_it
    ]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} each say which latents: give one of them")
    describer = _describer(args)
    rankings = tuple(dict.fromkeys([*([args.plan] if args.plan else []), *(args.rankings or ())]))
    read = {"model": args.model, "sae": args.sae, "data": args.data, "rankings": rankings}
    with reserved(args, **read), reporting(args) as report:
        from saesteer.sae import latents, save_latents
        from saesteer.sae.reading.neuronpedia import Names
        from saesteer.steering.ranking.marks import task_marks

        config = LatentsConfig(
            text=TextConfig(**given(args, TextConfig)),
            **given(args, LatentsConfig, every="all"),
        )
        names = Names(**given(args, Names))
        check_reading(args)
        sae = open_sae(args, report)
        config = _with_ids(args, config, sae)
        marks = task_marks(rankings, sae)
        if describer is not None:
            report.say(f"asking {args.describe}")
            describer.check()
        lm = open_model(args, report, name=sae.spec.model_name)
        found = latents(
            sae.to(lm.device),
            lm,
            config,
            describer=describer,
            tasks=marks,
            layer=args.layer,
            site=args.site,
            force=args.force,
            progress=report,
        )
        folder = take_folder(args)
        document = save_latents(found, folder, names, progress=report)
        write_run(folder, "latents", vars(args), model=document["model"], sae=document["sae"])
    if args.json:
        print_json(document)
    else:
        _print(found, document)
    return 0


def _describer(args: Namespace) -> "Describer | None":
    if (args.describe is None) != (args.describe_model is None):
        raise UsageError("--describe URL and --describe-model NAME belong together: give both")
    if args.describe is None:
        return None
    from saesteer.sae.reading.describe import Describer

    return Describer(args.describe, args.describe_model)


def _with_ids(args: Namespace, config: LatentsConfig, sae: "SAE") -> LatentsConfig:
    from dataclasses import replace

    from saesteer.sae.verbs.latents import check_ids
    from saesteer.steering.plans.plan_file import load_plan
    from saesteer.steering.ranking.marks import planned_latents

    if args.plan is not None:
        config = replace(config, ids=planned_latents(load_plan(args.plan), sae))
    check_ids(config.ids, sae.spec.d_sae)
    return config


def _print(found: "Latents", document: Document) -> None:
    rows = []
    for card in list(found[latent] for latent in found.ids[:_SHOWN]):
        judged = card.description.detection
        rows.append(
            [
                str(card.id),
                number(card.density, 2),
                number(card.max, 3),
                number(None if judged is None else judged.score, 2),
                card.description.text,
            ]
        )
    print_table(["latent", "density", "max", "detection", "description"], rows, left="description")
    if len(found) > _SHOWN:
        print(f"and {amount(len(found) - _SHOWN)} more")
    excluded = document["excluded"]
    print(
        f"layer {document['layer']} ({document['site']}), {amount(document['tokens'])} tokens; "
        f"left out {amount(excluded['special'])} special tokens and {amount(excluded['sinks'])} "
        f"attention sinks; {amount(document['dead'])} of {amount(document['sae']['d_sae'])} "
        "latents never fire on these"
    )
    print(f"export for Neuronpedia: {document['neuronpedia']}")
    print(f"page: {document['page']}")
