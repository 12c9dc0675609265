"""`saesteer attribute`: which prompt tokens drove which tokens of the reply, and how densely."""

from argparse import BooleanOptionalAction, Namespace
from dataclasses import replace

from saesteer.checkpoints.errors import UsageError
from saesteer.cli.flags import add_common, add_model, default, given
from saesteer.cli.inputs import exact_dtype, open_model, reserved
from saesteer.cli.output import Document, number, print_json, print_table
from saesteer.cli.parser import VerbParser
from saesteer.cli.progress import reporting
from saesteer.cli.reading_files import keep_reading
from saesteer.cli.values import count
from saesteer.cli.values import number as a_number
from saesteer.mechanisms.reading_config import AttributeConfig

EXAMPLE = (
    "saesteer attribute --model smollm2-135m-instruct --task french --n 2 --max-new-tokens 8 "
    "-o runs/attribution"
)
NEEDED = "(--task NAME | --prompts FILE)"
_SHOWN = 8


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    data = parser.add_argument_group("prompts")
    add_model(data)
    data.add_argument("--task", metavar="NAME", help="a built-in task (this or --prompts)")
    data.add_argument(
        "--prompts",
        metavar="FILE",
        help=".jsonl with prompt, instruction ([start, end] or its words), and if wanted reply and "
        "followed",
    )
    data.add_argument("--n", type=count, default=16, metavar="N", help="prompts (default: 16)")
    data.add_argument(
        "--placement",
        choices=("post", "pre"),
        default="post",
        metavar="END",
        help="with --task: the instruction after its content, or before (default: post)",
    )
    data.add_argument(
        "--chat",
        action=BooleanOptionalAction,
        help="send texts through the chat template (default: on)",
    )
    data.add_argument(
        "--max-new-tokens",
        type=count,
        metavar="N",
        help=f"longest reply {default(AttributeConfig, 'max_new_tokens')}",
    )
    tuned = parser.add_argument_group("two models")
    tuned.add_argument(
        "--tuned", metavar="MODEL", help="compare with this model on the same prompts"
    )
    tuned.add_argument(
        "--response",
        choices=("own", "same"),
        default="own",
        metavar="WHOSE",
        help="with --tuned: its own replies, or the same as the base's (default: own)",
    )
    how = parser.add_argument_group("attribution")
    how.add_argument(
        "--method",
        metavar="NAME",
        help=f"grad, ig or frozen {default(AttributeConfig, 'method')}",
    )
    how.add_argument(
        "--target",
        metavar="NAME",
        help=f"logprob or prob {default(AttributeConfig, 'target')}",
    )
    for flag, field, what in (
        ("--levels", "levels", "steps that a column is rounded up to"),
        ("--cut", "cut", "levels up to this one count as nothing"),
        ("--ig-steps", "ig_steps", "with ig: points of the line"),
        ("--ablate", "ablate", "densest tokens to ablate, as a check"),
    ):
        how.add_argument(
            flag, type=count, metavar="N", help=f"{what} {default(AttributeConfig, field)}"
        )
    how.add_argument(
        "--outputs",
        type=count,
        metavar="N",
        help="reply tokens to attribute, drawn by the seed (default: all)",
    )
    how.add_argument(
        "--budget",
        type=a_number,
        metavar="MINUTES",
        help="refuse what would take longer, as predicted from the first prompt "
        f"{default(AttributeConfig, 'budget_minutes')}",
    )
    add_common(
        parser,
        out="folder for report.json, report.html, effects.safetensors and run.json (default: "
        "print only)",
        force="replace earlier results in --out",
        seed_help="seed of contents, random spans and drawn outputs (default: 0)",
        dtype_help="arithmetic of the language model: auto, float32, bfloat16 or float16 (default: "
        "auto, float32 here: gradients are summed)",
    )


def run(args: Namespace) -> int:
    """Attribute the replies, and print the scores."""
    if (args.task is None) == (args.prompts is None):
        raise UsageError("give either --task NAME or --prompts FILE")
    config = AttributeConfig(**given(args, AttributeConfig, budget_minutes="budget"))
    with (
        reserved(args, model=args.model, prompts=args.prompts, tuned=args.tuned),
        reporting(args) as report,
    ):
        from saesteer.mechanisms import attribute, compare_attributions
        from saesteer.mechanisms.data.instructed import read_instructed, task_prompts

        prompts = (
            read_instructed(args.prompts)[: args.n]
            if args.prompts is not None
            else task_prompts(args.task, args.n, config.seed, args.placement)
        )
        dtype = exact_dtype(args)
        lm = open_model(args, report, dtype=dtype)
        result = attribute(lm, prompts, config, progress=report)
        if args.tuned is not None:
            by_text = {one.text: one.reply_ids for one in result.prompts}
            same = args.response == "same"
            chosen = [p for p in prompts if p.text in by_text] if same else prompts
            tuned = attribute(
                args.tuned, chosen, config, device=args.device, dtype=dtype, progress=report,
                replies=[by_text[p.text] for p in chosen] if same else None,
            )  # fmt: skip
            result = replace(result, comparison=compare_attributions(result, tuned))
        document = keep_reading(args, "attribute", result, "model")
    if args.json:
        print_json(document)
    else:
        _print(args, document)
    return 0


def _print(args: Namespace, document: Document) -> None:
    rows = [
        [
            number(one["score"], 3), number(one["random_score"], 3), number(one["drop"], 3),
            {True: "yes", False: "no", None: "-"}[one["followed"]],
            " ".join(one["reply"].split())[:48],
        ]
        for one in document["prompts"][:_SHOWN]
    ]  # fmt: skip
    print_table(["I", "random span", "ablated", "follows", "reply"], rows, left="follows,reply")
    summary = document["summary"]
    print(
        f"I {number(summary['score']['value'])}, random span of equal length "
        f"{number(summary['random_score']['value'])}; ablating the densest tokens costs "
        f"{number(summary['drop']['value'])} nats a token, random ones "
        f"{number(summary['random_drop']['value'])}; {len(document['prompts'])} prompts"
    )
    if found := document["comparison"]:
        print(
            f"tuned {number(found['tuned_score'])} against {number(found['base_score'])}: "
            f"{found['above']} up, {found['below']} down, sign test p {found['sign_p']:.2g}"
        )
    if args.out is not None:
        print(f"written to {args.out / 'report.html'}")
