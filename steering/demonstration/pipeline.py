"""The demo: load a model, harvest, train SAEs, find plans for some tasks, show what they do."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from saesteer.checkpoints import load_sae
from saesteer.checkpoints.files import claim_output, plain, write_json, write_text
from saesteer.checkpoints.model_files import DEFAULT_MODEL
from saesteer.checkpoints.sae_file import SAE
from saesteer.sae import (
    HarvestConfig,
    LatentsConfig,
    TextConfig,
    TrainConfig,
    harvest,
    latents,
    save_latents,
    train,
)
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.sae.reading.found_pages import latent_pages
from saesteer.sae.runs.facts import model_facts
from saesteer.steering.finding.find import FindConfig, find
from saesteer.steering.finding.found import save_found
from saesteer.steering.finding.phases import ReadConfig
from saesteer.steering.finding.search import SearchConfig
from saesteer.steering.reports.find_page import render_find
from saesteer.steering.tasks.task import Task, load_task, reply_prompts

PAGE = "demo.html"
LATENT_PAGES = "latents"
"""The folder of the latents' pages, with a folder for each layer."""
SAE_DEPTHS = (0.28, 0.41, 0.55, 0.68)
"""Where the SAEs sit, as shares of the depth: late enough to act on words, and later blocks still
process what is changed."""


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """Sizes of the demo's stages. The defaults take some minutes on two CPU cores."""

    tasks: tuple[str, ...] = ("question", "french", "json")
    """Built-in tasks of different kinds: the form of a sentence, its language, a format."""
    reply_contents: int = 32
    """Contents that each task is applied to, for the replies that the SAEs are trained on."""
    depths: tuple[float, ...] = SAE_DEPTHS
    harvest_tokens: int = 100_000
    train_tokens: int = 300_000
    latents_per_d_model: int = 4
    find: FindConfig = FindConfig(
        budget_minutes=2.5,
        read=ReadConfig(contents=24),
        search=SearchConfig(rows=48),
        dev=12,
        test=30,
        when=True,
    )
    """For each task. With a condition: unrelated prompts are to stay as they are."""
    pages: int = 8
    """Latents of each phase at each layer that get a page."""
    page_tokens: int = 8_000
    """Positions of the Python reference that these pages are made from."""


FULL = DemoSize()
QUICK = DemoSize(
    tasks=("question",),
    reply_contents=24,
    depths=SAE_DEPTHS[1:3],
    harvest_tokens=48_000,
    train_tokens=144_000,
    find=FindConfig(
        budget_minutes=1.5,
        read=ReadConfig(contents=16),
        search=SearchConfig(rows=32, first=6, more=4, finalists=2),
        dev=10,
        test=16,
        when=True,
    ),
    pages=6,
    page_tokens=4_000,
)


@dataclass
class Stage:
    """One stage of the demo."""

    kind: str
    """model, harvest, train, find or latents."""
    name: str
    """Its key in `demo.json`: the kind, with the task where there are several."""
    what: str
    """What it does, in words."""
    run: Callable[[], dict[str, Any]]
    """Does the work. Returns its figures, JSON-ready, `seconds` among them."""


class Demo:
    """The stages of the demo and their results, for use one by one; `demo` runs them all."""

    def __init__(
        self,
        out: str | Path,
        tasks: str | Path | Task | Sequence[str | Path | Task] = (),
        *,
        model: str | LanguageModel = DEFAULT_MODEL,
        size: DemoSize = FULL,
        seed: int = 0,
        device: str = "auto",
        dtype: str = "auto",
        progress: Progress = no_progress,
        warn: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.out, self.model, self.size, self.seed = Path(out), model, size, seed
        given = [tasks] if isinstance(tasks, str | Path | Task) else tasks or size.tasks
        self.tasks = [task if isinstance(task, Task) else load_task(task) for task in given]
        self.device, self.dtype = device, dtype
        self.progress, self.warn = progress, warn
        self.document: dict[str, Any] = {"schema_version": 2, "complete": False, "stages": {}}
        """What `demo.json` holds."""
        self.saes: dict[int, SAE] = {}
        """The trained SAEs, by layer."""
        self.sae_folders: dict[int, str] = {}
        self.found: list[dict[str, Any]] = []
        """The contents of each task's find.json, in the order of the tasks."""
        self.lm: LanguageModel
        self._started = time.monotonic()
        write_json(self.out / "demo.json", self.document)

    def stages(self) -> Iterator[Stage]:
        """The stages in order. Each has to be run before the next one is taken."""
        name = self.model if isinstance(self.model, str) else self.model.name
        what = f"load {name} (its first use converts the weights once)"
        yield self._stage("model", "model", what, self._load)
        layers = tuple(
            sorted({round(share * (self.lm.n_layers - 1)) for share in self.size.depths})
        )
        said = ", ".join(map(str, layers))
        texts = self._prompts()
        what = (
            f"the model answers {len(texts)} prompts, with the instructions and without; replies "
            f"and the Python reference go through it once; activations of layers {said} stay"
        )
        yield self._stage("harvest", "harvest", what, partial(self._harvest, layers, texts))
        d_sae = self.size.latents_per_d_model * self.lm.d_model
        what = f"TopK SAEs of {d_sae} latents, k 32, on {self.size.train_tokens:,} activations each"
        yield self._stage("train", "train", what, partial(self._train, d_sae))
        for task in self.tasks:
            what = (
                f"how to steer {task.instruction!r}: layers, phases and doses, then the fewest "
                "latents that do nearly as much"
            )
            yield self._stage("find", f"find {task.name}", what, partial(self._find, task))
        what = "where the first latents of each plan fire, in the Python reference; a page for each"
        yield self._stage("latents", "latents", what, self._latents)

    def finish(self) -> dict[str, Any]:
        """Mark `demo.json` as complete and write the page. Returns what `demo.json` holds."""
        seconds = round(time.monotonic() - self._started, 1)
        self.document |= {"complete": True, "seconds": seconds, "page": PAGE}
        pages = latent_pages((), [self.out / LATENT_PAGES], self.out)
        write_text(self.out / PAGE, render_find(self.found, "What the demo found", pages))
        write_json(self.out / "demo.json", self.document)
        return self.document

    def plan_folder(self, task: Task) -> Path:
        """The folder of the plan of a task; its plan in latents is in `latents` inside."""
        return self.out / f"plan-{task.name}"

    def _stage(self, kind: str, name: str, what: str, work: Callable[[], dict[str, Any]]) -> Stage:
        """A stage whose `run` times the work and adds its figures to the document."""

        def run() -> dict[str, Any]:
            started = time.monotonic()
            facts = work()
            facts["seconds"] = round(time.monotonic() - started, 1)
            self.document["stages"][name] = facts
            # Written after each stage, so that a demo that is stopped keeps its results so far.
            write_json(self.out / "demo.json", self.document)
            return facts

        return Stage(kind, name, what, run)

    def _load(self) -> dict[str, Any]:
        self.lm = as_language_model(self.model, device=self.device, dtype=self.dtype)
        return model_facts(self.lm)

    def _prompts(self) -> list[str]:
        prompts = reply_prompts(
            self.tasks, contents=self.size.reply_contents, plain=1, seed=self.seed
        )
        return [prompt.text for prompt in prompts]

    def _harvest(self, layers: tuple[int, ...], texts: Sequence[str]) -> dict[str, Any]:
        manifest = harvest(
            self.lm,
            self.out / "activations",
            HarvestConfig(
                layers=layers,
                tokens=self.size.harvest_tokens,
                text=TextConfig(epochs=2, replies_share=0.45, seed=self.seed),
            ),
            replies=texts,
            replies_folder=self.out / "replies",
            progress=self.progress,
            warn=self.warn,
        )
        return {
            "layers": list(layers),
            "tokens": manifest["tokens"],
            "excluded": manifest["excluded"],
            "tokens_per_second": round(manifest["tokens"] / max(manifest["seconds"], 1e-9), 1),
            "reply_prompts": len(texts),
        }

    def _train(self, d_sae: int) -> dict[str, Any]:
        runs = train(
            self.out / "sae",
            TrainConfig(d_sae=(d_sae,), tokens=self.size.train_tokens, seed=self.seed),
            activations=self.out / "activations",
            device=self.device,
            progress=self.progress,
        )
        for made in runs:
            layer = made["sae"]["layer"]
            self.saes[layer] = load_sae(made["folder"], device=self.lm.device)
            self.sae_folders[layer] = made["folder"]
        return {f"layer {made['sae']['layer']}": made["final"] for made in runs}

    def _find(self, task: Task) -> dict[str, Any]:
        found = find(
            self.lm,
            task,
            list(self.saes.values()),
            self.size.find.with_seed(self.seed),
            progress=self.progress,
        )
        document: dict[str, Any] = plain(save_found(self.plan_folder(task), found))
        self.found.append(document)
        return {key: document[key] for key in _TOLD}

    def _latents(self) -> dict[str, Any]:
        pages: dict[str, Any] = {}
        for layer, sae in self.saes.items():
            rows = [
                row[phase]["latents"][: self.size.pages]
                for found in self.found
                for row in (found["latents"] or {"layers": ()})["layers"]
                if row["layer"] == layer
                for phase in ("tail", "replies")
            ]
            ids = tuple(dict.fromkeys(i for row in rows for i in row))
            if not ids:
                continue
            config = LatentsConfig(tokens=self.size.page_tokens, ids=ids, steer=0)
            cards = latents(sae, self.lm, config, progress=self.progress)
            folder = self.out / LATENT_PAGES / f"layer-{layer}"
            save_latents(cards, folder, progress=self.progress)
            pages[f"layer {layer}"] = {"folder": str(folder), "latents": len(ids)}
        return pages


_TOLD = (
    "task", "arms", "setting", "within_budget", "over_budget", "damage", "when", "latents",
)  # fmt: skip
"""Of find.json, what demo.json repeats: everything but the settings that were tried."""


def demo(
    out: str | Path,
    tasks: str | Path | Task | Sequence[str | Path | Task] = (),
    *,
    model: str | LanguageModel = DEFAULT_MODEL,
    size: DemoSize = FULL,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
    progress: Progress = no_progress,
    warn: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Run every stage from a model to steering plans and a page, and keep all files in a folder.

    The model answers prompts with and without the tasks' instructions; its activations at some
    layers train an SAE each; for each task `find` searches how to steer, in directions and in
    latents of these SAEs, and reports once on test contents, damage beside success.

    Args:
        out: the folder; an error when it is not empty, unless `force` empties it.
        tasks: one or several; by default those of `size`.
        size: sizes of the stages: `FULL`, or `QUICK`, which is about a third of the work.

    Returns:
        What `demo.json` holds: `stages` with the figures of each by name, and `seconds`.

    Raises:
        UsageError: a folder in use, an unknown task.
        UserError: a model that cannot be loaded, a task without a check or without contents.
    """
    claim_output(Path(out), force=force)
    made = Demo(
        out,
        tasks,
        model=model,
        size=size,
        seed=seed,
        device=device,
        dtype=dtype,
        progress=progress,
        warn=warn,
    )
    for stage in made.stages():
        stage.run()
    return made.finish()
