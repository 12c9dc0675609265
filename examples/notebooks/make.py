"""Make and run the notebooks of this folder.

    python examples/notebooks/make.py                 # a quarter of an hour on two busy cores
    python examples/notebooks/make.py --model FOLDER  # with another model, to try the cells

The cells are below; the notebooks, with their outputs, are written by running them in an empty
folder.
Needs `pip install 'saesteer[notebooks]'`.
"""

# ruff: noqa: E501 (the lines of cells)

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MODEL = "smollm2-135m-instruct-q4"
"""De-quantised 4-bit weights, which need no account and no Hub."""
LARGEST = 200_000
"""Bytes of a notebook with its outputs."""

ROAD = [
    """# The road, on one small model

From a language model to a steered one in a few cells: activations, a sparse autoencoder, latents of
an instruction, a plan. Everything is small, so that it runs on a laptop in minutes: eight thousand
tokens make a poor SAE, and what it steers is no result. The
[tutorial](../../docs/tutorials/own-model.md) has the sizes that are worth your time.""",
    f"""import saesteer
from saesteer import sae, steering

MODEL = "{MODEL}"
lm = saesteer.load_model(MODEL)
lm""",
    "## Activations\n\nText goes through the model once; what one block puts out is kept.",
    """LAYER = 2 * lm.n_layers // 3
TOKENS, TRAIN_TOKENS, CONTENTS = 8_000, 40_000, 6
text = sae.TextConfig(context=128)
manifest = saesteer.harvest(
    lm, "runs/acts", sae.HarvestConfig(layers=(LAYER,), tokens=TOKENS, text=text)
)
manifest["tokens"], manifest["excluded"]""",
    "## A sparse autoencoder\n\n`train` gives the SAE with its record; its log is a chart.",
    """(trained,) = saesteer.train(
    "runs/sae",
    sae.TrainConfig(d_sae=(2 * lm.d_model,), tokens=TRAIN_TOKENS, batch_tokens=1024),
    activations="runs/acts",
)
trained""",
    "trained.plot()",
    """## How good is it?

On text that it was trained on, here, for want of other text offline: the figures flatter it, and
`seen_in_training` says so.""",
    """figures = saesteer.metrics(trained.sae, lm, sae.MetricsConfig(tokens=1_000, bootstrap=200))
figures["seen_in_training"], figures.to_frame().loc[["fvu", "l0", "ce_recovered"]].round(3)""",
    "## Latents of an instruction",
    """ranking = saesteer.rank(
    lm, trained.sae, "french", steering.RankConfig(read="last", contents=CONTENTS, shuffles=5)
)
ranking.to_frame()[["score", "rate_positive", "rate_negative", "mu", "sigma"]].head().round(3)""",
    "## Steering\n\nInside the `with` block the model is steered, in its own `generate`.",
    """plan = steering.plan_from_ranking(lm, trained.sae, ranking, top=5)
prompt = lm.tokenizer.apply_chat_template(
    [{"role": "user", "content": "The old bridge was closed for the winter."}],
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)
start = prompt["input_ids"].shape[1]
plain = lm.model.generate(**prompt, max_new_tokens=20, do_sample=False)
with saesteer.steer(lm, plan) as report:
    steered = lm.model.generate(**prompt, max_new_tokens=20, do_sample=False)
for name, output in (("plain", plain), ("steered", steered)):
    print(f"{name}: {lm.tokenizer.decode(output[0][start:], skip_special_tokens=True)!r}")
report""",
    "report.plot()",
    """`saesteer sweep` chooses a dose, and `saesteer evaluate` compares the plan with prompting, random
latents and the mean difference, with what each breaks.""",
]

PUBLISHED = [
    """# A published SAE: read, ranked, steered

An SAE that somebody shared is named `RELEASE:ID` (the releases of SAELens), or `REPO@REVISION:ID` (a
repository on the Hub). So that this notebook runs without a network, its repository is a folder of the
same layout, which the first cells make: put your own name in its place.""",
    f"""import saesteer
from saesteer import checkpoints, sae, steering

MODEL = "{MODEL}"
lm = saesteer.load_model(MODEL)
LAYER = 2 * lm.n_layers // 3
TOKENS, TRAIN_TOKENS, CONTENTS = 8_000, 40_000, 6
text = sae.TextConfig(context=128)
saesteer.harvest(
    lm, "runs/acts", sae.HarvestConfig(layers=(LAYER,), tokens=TOKENS, text=text)
)
saesteer.train(
    "runs/sae",
    sae.TrainConfig(d_sae=(2 * lm.d_model,), tokens=TRAIN_TOKENS, batch_tokens=1024),
    activations="runs/acts",
)
shared = checkpoints.push("runs/sae", "./shared", license_name="apache-2.0")
list(shared["saes"])""",
    "## Read it\n\nThe weights are compared with the hash in the repository. No code in it is ever run.",
    """(ID,) = shared["saes"]
published = saesteer.load_sae(f"./shared:{{ID}}")
published""".replace("{{ID}}", "{ID}"),
    "The same call takes `RELEASE:ID`. An SAE of another width says so in one line:",
    """import torch

try:
    published.encode(torch.zeros(3, 7))
except ValueError as error:
    print(error)""",
    "## What does it see?\n\nThe latents that are most active on each token of a sentence.",
    """from saesteer.sae.model.hooks import capture, resolve_site

text = "Translate this sentence into French."
tokens = lm.tokenizer(text, return_tensors="pt")
here = resolve_site(lm, published.spec.layer)
with torch.no_grad(), capture([here]) as seen:
    lm.model(**tokens)
acts = published.encode(seen[here.key][0].float())
words = lm.tokenizer.convert_ids_to_tokens(tokens["input_ids"][0])
for token, row in zip(words[1:], acts[1:], strict=True):
    value, latent = row.max(dim=0)
    print(f"{token!r:14} latent {int(latent):5d}  {float(value):8.1f}")""",
    "## Rank its latents for an instruction of your own",
    """ranking = saesteer.rank(
    lm, published, "uppercase", steering.RankConfig(read="last", contents=CONTENTS, shuffles=5)
)
best = ranking.top(3)
ranking.to_frame()[["score", "rate_positive", "rate_negative", "mu"]].head(3).round(3)""",
    """## Steer with latents by number

`add` adds the decoder row at a length; `ablate` takes a latent out. What the SAE does not reconstruct
stays exactly as it was.""",
    """for method, values in (("add", {i: 40.0 for i in best}), ("ablate", {i: None for i in best})):
    plan = steering.plan_from_latents(lm, published, None, values, method=method)
    (answer,) = steering.generate_steered(
        lm, ["The old bridge was closed."], plan, baseline=True, max_new_tokens=16, sae=published
    )
    print(f"{method:7} {answer.completion!r}")
    print(f"{'plain':7} {answer.baseline!r}  ({answer.tokens_touched} positions edited)")""",
]

NOTEBOOKS = {"road": ROAD, "published_sae": PUBLISHED}


def notebook(cells: Sequence[str]) -> Any:
    """A notebook of these cells: text begins with a heading or a word in prose, code does not."""
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    made = [new_code_cell(text) if is_code(text) else new_markdown_cell(text) for text in cells]
    for place, cell in enumerate(made):
        cell["id"] = f"cell-{place}"  # the same at every run
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=made, metadata={"kernelspec": kernel})


def is_code(text: str) -> bool:
    """Whether a cell holds code: it compiles."""
    try:
        compile(text, "cell", "exec")
    except SyntaxError:
        return False
    return not text.startswith("#")


def run(cells: Sequence[str], folder: Path) -> Any:
    """The notebook with its outputs; raises CellExecutionError where a cell fails."""
    from nbclient import NotebookClient

    made = notebook(cells)
    os.environ["TQDM_DISABLE"] = "1"  # a bar's every step would be an output
    client = NotebookClient(made, timeout=1800, resources={"metadata": {"path": str(folder)}})
    client.execute()
    return cleaned(made)


def cleaned(made: Any) -> Any:
    """Without what differs from machine to machine: times, and what libraries say on stderr."""
    for cell in made.cells:
        cell.metadata.clear()
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
    made.metadata.pop("language_info", None)
    return made


def smaller(cells: Sequence[str], model: str) -> list[str]:
    """The same cells with another model, and as little work as they can do."""
    changes = {
        f'"{MODEL}"': repr(model),
        "= 8_000, 40_000, 6": "= 1_000, 4_096, 2",
        "tokens=1_000, bootstrap=200": "tokens=200, bootstrap=20",
    }
    found = list(cells)
    for old, new in changes.items():
        found = [text.replace(old, new) for text in found]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    import nbformat

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="try the cells with this model, small, and write nothing")
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(NOTEBOOKS)} (default: all)")
    args = parser.parse_args(argv)
    for name in args.names or NOTEBOOKS:
        cells = NOTEBOOKS[name]
        with tempfile.TemporaryDirectory() as folder:
            if args.model:
                run(smaller(cells, args.model), Path(folder))
                print(f"{name}: every cell ran")
                continue
            made = run(cells, Path(folder))
        text = nbformat.writes(made)
        if len(text.encode()) > LARGEST:
            raise SystemExit(f"{name} takes {len(text.encode()):,} bytes: show less")
        (HERE / f"{name}.ipynb").write_text(text + "\n", encoding="utf-8")
        print(f"{name}: {len(text.encode()):,} bytes")


if __name__ == "__main__":
    main()
