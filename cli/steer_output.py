"""What `saesteer steer` writes and prints."""

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from saesteer.cli.output import Colour, Document, paint, write_run
from saesteer.cli.output import number as figure

if TYPE_CHECKING:
    from saesteer.sae.model.language_model import LanguageModel
    from saesteer.steering.hooking.latent_changes import LatentChange
    from saesteer.steering.plans.plan import Plan


def write_answers(
    folder: Path, args: Namespace, lm: "LanguageModel", rows: list[Document], dosed: "Plan | None"
) -> None:
    """Write results.jsonl, run.json, and the plan that `--dose` found."""
    import json

    from saesteer.checkpoints.files import plain, write_text

    lines = (json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows)
    write_text(folder / "results.jsonl", "".join(lines))
    if dosed is not None:
        from saesteer.steering import save_plan

        save_plan(dosed, folder / "plan")
    write_run(folder, "steer", vars(args), model={"name": lm.name, "hash": lm.fingerprint})


def print_blocks(args: Namespace, rows: list[Document]) -> None:
    """Print one block of text for each prompt."""
    steered = args.plan is not None or args.sae is not None
    for row in rows:
        _print_labelled("prompt", row["prompt"], "dim")
        if "baseline" in row:
            _print_labelled("unsteered", row["baseline"], "bold")
        if steered:
            _print_labelled("steered", row["completion"], "green")
            print(
                f"{row['tokens_touched']} tokens touched, relative dose "
                f"{figure(row['relative_dose'], 3)}"
            )
        for way, answer in row.get("beside", {}).items():
            _print_labelled(_short(way), answer["completion"], "yellow")
            if answer["tokens_touched"]:
                print(
                    f"{answer['tokens_touched']} tokens touched, relative dose "
                    f"{figure(answer['relative_dose'], 3)}"
                )
        print()
    if args.out is not None:
        print(f"written to {args.out / 'results.jsonl'}")


def _print_labelled(label: str, text: str, colour: Colour) -> None:
    """A label, and a text whose further lines are indented below its first."""
    indented = ("\n" + " " * 11).join(text.splitlines() or ["(nothing)"])
    print(f"{paint(label.ljust(10), colour)} {indented}")


def _short(way: str) -> str:
    """The label of a value of `--beside`: a plan is named by its folder."""
    if way == "meandiff" or way.partition(":")[0] == "prompt":
        return way.partition(":")[0]
    path = Path(way)
    return path.parent.name if path.name == "plan.yaml" else path.name


def print_changes(changes: "list[LatentChange]") -> None:
    """Print one line per latent: the change asked for and the change measured."""
    if not changes:
        return
    print(f"change of each latent, mean over the {changes[0].tokens} tokens that were changed")
    print(f"{'latent':>8}{'before':>10}{'after':>10}{'asked':>10}{'measured':>10}{'on':>14}")
    for change in changes:
        print(
            f"{change.id:>8}{change.before:>10.3f}{change.after:>10.3f}"
            f"{figure(change.asked, 3):>10}{change.measured:>10.3f}"
            f"{f'{change.on_before:.0%} to {change.on_after:.0%}':>14}"
        )
