"""`saesteer circuit`: which heads carry an answer, by which path, and do they suffice."""

from argparse import Namespace
from pathlib import Path

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
from saesteer.cli.inputs import exact_dtype, open_model, reserved, take_folder
from saesteer.cli.output import Document, number, print_json, print_table, write_run
from saesteer.cli.parser import VerbParser
from saesteer.cli.progress import reporting
from saesteer.cli.values import count, counts, names
from saesteer.cli.values import number as a_number
from saesteer.mechanisms.config import ABLATIONS, SCORES, CircuitConfig

EXAMPLE = (
    "saesteer circuit --model runs/hand/model --pairs runs/hand/scenes.jsonl "
    "--groups runs/hand/groups.yaml -o runs/circuit"
)
NEEDED = "--pairs FILE"


def add_flags(parser: VerbParser) -> None:
    """The flags of this verb."""
    data = parser.add_argument_group("pairs and groups")
    add_model(data)
    add_pairs(data, makers="boxes:N", n=200)
    data.add_argument(
        "--groups",
        metavar="FILE",
        help="YAML list of groups from the end backwards: name, at, to, by, source-at (default for "
        "boxes: fetcher, transmitter, detector, reader)",
    )
    search = parser.add_argument_group("search")
    search.add_argument(
        "--top", type=counts_with_repeats, metavar="N,...",
        help="heads to take for each group (default: all that pass --fdr and --least)",
    )  # fmt: skip
    search.add_argument(
        "--fdr",
        type=a_number,
        metavar="Q",
        help=f"false discovery rate of the sign test of a head {default(CircuitConfig, 'fdr')}",
    )
    search.add_argument(
        "--score",
        choices=SCORES,
        metavar="NAME",
        help="what heads are scored by: logit-diff (answer minus wrong) or prob (of the answer) "
        f"{default(CircuitConfig, 'score')}",
    )
    search.add_argument(
        "--least",
        type=a_number,
        metavar="X",
        help="smallest share of the score that a head which is taken loses "
        f"{default(CircuitConfig, 'least')}",
    )
    search.add_argument(
        "--keep",
        type=a_number,
        metavar="SHARE",
        help="drop heads while the circuit keeps this share of the logit difference; 1: drop none "
        f"{default(CircuitConfig, 'keep')}",
    )
    search.add_argument(
        "--mask",
        type=names,
        metavar="NAME,...",
        help="positions at which to learn a mask over heads as well (default: none)",
    )
    search.add_argument(
        "--desiderata",
        type=names,
        metavar="PAIRS,...",
        help="with --mask: learn a mask for each of these pairs as well, made for one property: "
        "boxes:N:object, boxes:N:position, boxes:N:label or .jsonl (default: only the answers of "
        "--pairs)",
    )
    search.add_argument(
        "--cross",
        metavar="MODEL",
        help="a tuned model of the same form: put its heads into this one, and see how much of the "
        "difference they bring (default: none)",
    )
    test = parser.add_argument_group("test")
    test.add_argument(
        "--ablate",
        choices=ABLATIONS,
        metavar="HOW",
        help="what heads outside give: their mean over prompts at the same token, or their value "
        f"in the corrupt run {default(CircuitConfig, 'ablate')}",
    )
    test.add_argument(
        "--draws",
        type=count,
        metavar="N",
        help=f"random subsets for completeness {default(CircuitConfig, 'draws')}",
    )
    test.add_argument(
        "--random",
        type=count,
        metavar="N",
        help=f"random circuits of equal size {default(CircuitConfig, 'random')}",
    )
    test.add_argument(
        "--held-out",
        type=a_number,
        metavar="SHARE",
        help=f"share of the pairs to test on {default(CircuitConfig, 'held_out')}",
    )
    add_common(
        parser,
        out="folder for circuit.json, report.json, report.html and run.json (default: print only)",
        force="replace earlier results in --out",
        seed_help="seed of the pairs that are made, of draws and of masks (default: 0)",
        dtype_help=PAIRS_DTYPE_HELP,
    )


def counts_with_repeats(text: str) -> tuple[int, ...]:
    """Whole numbers with commas between them, which may be equal."""
    return tuple(number for part in text.split(",") for number in counts(part))


def run(args: Namespace) -> int:
    """Find the circuit, test it, and print both."""
    need(args, "--pairs", "pairs of prompts, or boxes:N")
    config = CircuitConfig(**given(args, CircuitConfig))
    with (
        reserved(args, model=args.model, pairs=args.pairs, groups=args.groups, cross=args.cross),
        reporting(args) as report,
    ):
        from saesteer.mechanisms import load_pairs, save_study, study_circuit
        from saesteer.mechanisms.circuits.groups import BOXES, read_groups
        from saesteer.mechanisms.circuits.study import check_study

        pairs = load_pairs(args.pairs, n=args.n, seed=config.seed)
        if args.groups is not None:
            groups = read_groups(args.groups)
        elif args.pairs.partition(":")[0] == "boxes":
            groups = BOXES
        else:
            raise UsageError("--groups is missing: a YAML list of groups; only boxes:N has its own")
        desiderata = {
            Path(name).stem if name.endswith(".jsonl") else name.rpartition(":")[2]: load_pairs(
                name, n=args.n, seed=config.seed
            )
            for name in args.desiderata or ()
        }
        check_study(pairs, groups, args.mask or (), desiderata)
        lm = open_model(args, report, dtype=exact_dtype(args))
        study = study_circuit(
            lm, pairs, groups, config, masks=args.mask or (), desiderata=desiderata,
            cross=args.cross, device=args.device, dtype=str(lm.dtype).removeprefix("torch."),
            drop=not Path(args.pairs).is_file(), progress=report,
        )  # fmt: skip
        if args.out is None:
            document = study.document()
        else:
            folder = take_folder(args)
            document = save_study(folder, study)
            write_run(folder, "circuit", vars(args), model=document["model"])
    if args.json:
        print_json(document)
    else:
        _print(args, document)
    return 0


def _print(args: Namespace, document: Document) -> None:
    test = document["test"]
    from saesteer.mechanisms.reports.circuit_page import head_score

    cost = {(name, tuple(head)): lost for name, head, lost in test["minimality"]}
    rows = []
    for group in document["circuit"]["groups"]:
        for layer, head in group["heads"]:
            score, low, high = head_score(group, layer, head)
            lost = cost[group["name"], (layer, head)]
            ends = "-" if low is None else f"[{number(low, 2)}, {number(high, 2)}]"
            rows.append([group["name"], group["at"], f"{layer}.{head}", number(score), ends,
                         number(lost)])  # fmt: skip
    print_table(
        ["group", "at", "head", "score", "95 % interval", "cost"], rows,
        left="group,at,95 % interval",
    )  # fmt: skip
    print(f"score: share of {document['circuit']['metric']} that a head loses on its path")
    print(
        f"answer minus wrong logit: model {number(test['full']['value'])}, circuit alone "
        f"{number(test['alone']['value'])}, no head {number(test['nothing']['value'])} "
        f"({test['ablate']}; {document['n_tested_on']} pairs that no head was found on)"
    )
    print(
        f"faithfulness {_figure(test['faithfulness'])}; largest gap of completeness "
        f"{number(test['completeness_gap'], 3)}; best of {len(test['random'])} random circuits "
        f"{number(max(test['random'], default=None), 3)}"
    )
    for mask in document["masks"]:
        heads = ", ".join(f"{layer}.{head}" for layer, head in mask["heads"]) or "none"
        print(
            f"mask for {mask['wanted']} at {mask['at']}: heads {heads}; "
            f"{_figure(mask['accuracy'])} give the answer that is wanted, "
            f"{number(mask['random']['value'], 2)} with as many at random, "
            f"{number(mask['every']['value'], 2)} with all"
        )
    if document["cross"]:
        cross = document["cross"]
        print(
            f"tuned model: {number(cross['tuned'])} against {number(cross['base'])}; recovered by"
        )
        for name, value in cross["recovered"].items():
            print(f"  {name}: {_figure(value)}")
    if document["overlap"]:
        overlap = document["overlap"]
        print(
            f"the tuned model's own circuit: {number(overlap['kept'], 2)} of these heads are in it "
            f"(Jaccard {number(overlap['jaccard'], 2)}, by chance {number(overlap['random'], 2)})"
        )
    if args.out is not None:
        print(f"written to {args.out / 'circuit.json'}")


def _figure(value: Document) -> str:
    ends = "" if value["low"] is None else f" [{value['low']:.2f}, {value['high']:.2f}]"
    return f"{value['value']:.2f}{ends}"
