"""The demo: load a model, harvest, train SAEs, rank, choose doses, evaluate."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from saesteer.checkpoints import load_sae
from saesteer.checkpoints.files import claim_output, write_json
from saesteer.checkpoints.model_files import DEFAULT_MODEL
from saesteer.checkpoints.sae_file import SAE
from saesteer.sae import HarvestConfig, TextConfig, TrainConfig, harvest, train
from saesteer.sae.config import Progress, no_progress
from saesteer.sae.model.language_model import LanguageModel, as_language_model
from saesteer.sae.runs.facts import model_facts
from saesteer.steering.doses.sweep import Grid, Trial, calibrate
from saesteer.steering.evaluation.arms import Decoding, evaluate
from saesteer.steering.evaluation.graded_arms import Arm
from saesteer.steering.plans.plan import Plan
from saesteer.steering.plans.plan_file import save_plan
from saesteer.steering.ranking.rank import RankConfig, Ranking, plan_from_ranking, rank
from saesteer.steering.tasks.task import Task, load_task, reply_prompts

TEST_CONTENTS = 40
"""Contents of the test split that the evaluation answers, or as many as there are."""


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """Sizes of the demo's stages. The defaults take some minutes on two CPU cores."""

    reply_tasks: tuple[str, ...] = ("german", "json")
    """Built-in tasks whose replies the SAEs are trained on, besides those of the task itself."""
    reply_contents: int = 48
    """Contents that each of these tasks is applied to."""
    plain: int = 2
    """How often every content is answered without an instruction."""
    harvest_tokens: int = 160_000
    train_tokens: int = 480_000
    rank_contents: int = 48
    latents: tuple[int, ...] = (1, 3, 5)
    """Numbers of latents to try."""
    scales: tuple[float, ...] = (1.0, 1.5, 2.0)
    scopes: tuple[str, ...] = ("generation", "all")
    rounds: tuple[tuple[int, int], ...] = ((10, 4), (55, 1))
    """Rounds of the choice of a dose: contents answered, settings kept."""
    greedy: bool = True
    """Evaluate with greedy decoding as well."""
    latents_per_d_model: int = 8


FULL = DemoSize()
QUICK = DemoSize(
    reply_tasks=("json",),
    reply_contents=24,
    harvest_tokens=64_000,
    train_tokens=192_000,
    rank_contents=24,
    scopes=("generation",),
    rounds=((8, 3), (24, 1)),
    greedy=False,
)


@dataclass
class Setting:
    """One way to steer: a layer, a ranking there, and the doses to try."""

    name: str
    layer: int
    config: RankConfig
    grid: Grid
    ranking: Ranking | None = None
    plan: Plan | None = None
    trials: list[Trial] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The name of its arm."""
        return f"{self.name}, layer {self.layer}"


@dataclass
class Stage:
    """One stage of the demo."""

    kind: str
    """model, harvest, train, rank, choose dose or evaluate."""
    name: str
    """Its key in `demo.json`: the kind, with the layer where there are several."""
    what: str
    """What it does, in words."""
    run: Callable[[], dict[str, Any]]
    """Does the work. Returns its figures, JSON-ready, `seconds` among them."""
    setting: Setting | None = None
    """The setting that is ranked, or whose dose is chosen."""


class Demo:
    """The stages of the demo and their results, for use one by one; `demo` runs them all."""

    def __init__(
        self,
        out: str | Path,
        task: str | Path | Task = "french",
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
        self.task = task if isinstance(task, Task) else load_task(task)
        self.device, self.dtype = device, dtype
        self.progress, self.warn = progress, warn
        self.document: dict[str, Any] = {"schema_version": 1, "complete": False, "stages": {}}
        """What `demo.json` holds."""
        self.saes: dict[int, SAE] = {}
        """The trained SAEs, by layer."""
        self.sae_folders: dict[int, str] = {}
        self.settings: tuple[Setting, ...] = ()
        self.sampled: Sequence[Arm] = ()
        self.greedy: Sequence[Arm] = ()
        self.lm: LanguageModel
        self._started = time.monotonic()
        write_json(self.out / "demo.json", self.document)

    def stages(self) -> Iterator[Stage]:
        """The stages in order. Each has to be run before the next one is taken."""
        name = self.model if isinstance(self.model, str) else self.model.name
        what = f"load {name} (its first use converts the weights once)"
        yield self._stage("model", what, self._load)
        # Two thirds of the depth: late enough to act on words, and later blocks still process it.
        middle, last = 2 * self.lm.n_layers // 3, self.lm.n_layers - 1
        tasks, texts = self._prompts()
        what = (
            f"the model answers {len(texts)} prompts ({', '.join(tasks)}, plain); replies and the "
            f"Python reference go through it once; layers {middle} and {last} stay"
        )
        yield self._stage("harvest", what, partial(self._harvest, (middle, last), texts))
        size, d_sae = self.size, self.size.latents_per_d_model * self.lm.d_model
        what = f"two TopK SAEs, {d_sae} latents, k 32, on {size.train_tokens:,} activations"
        yield self._stage("train", what, partial(self._train, d_sae))
        contents = size.rank_contents
        self.settings = (
            Setting(
                "steered",
                middle,
                RankConfig(read="reply", contents=contents, seed=self.seed),
                Grid(k=size.latents, scale=size.scales, scope=size.scopes),
            ),
            # As in the paper: last block, last token of the user's text, score saif, 15 latents.
            Setting(
                "paper's setting",
                last,
                RankConfig(read="last", by="saif", contents=contents, seed=self.seed),
                Grid(k=(15,), scale=(0.5, *size.scales), scope=("generation",)),
            ),
        )
        for setting in self.settings:
            replies = setting.config.read == "reply"
            where = "the model's replies" if replies else "the prompt's last word"
            what = (
                f"latents of layer {setting.layer} for {self.task.instruction!r}, read at {where}"
            )
            yield self._stage("rank", what, partial(self._rank, setting), setting)
        for setting in self.settings:
            assert setting.plan is not None
            tried = len(setting.grid.plans(setting.plan))
            what = f"of {tried} settings for layer {setting.layer}, on development contents"
            yield self._stage("choose dose", what, partial(self._choose_dose, setting), setting)
        n = min(TEST_CONTENTS, len(self.task.contents.get("test", ())))
        what = f"on {n} test contents that nothing above has seen"
        yield self._stage("evaluate", what, partial(self._evaluate, n))

    def finish(self) -> dict[str, Any]:
        """Mark `demo.json` as complete. Returns its content."""
        seconds = round(time.monotonic() - self._started, 1)
        self.document |= {"complete": True, "seconds": seconds}
        write_json(self.out / "demo.json", self.document)
        return self.document

    def _stage(
        self,
        kind: str,
        what: str,
        work: Callable[[], dict[str, Any]],
        setting: Setting | None = None,
    ) -> Stage:
        """A stage whose `run` times the work and adds its figures to the document."""
        name = kind if setting is None else f"{kind}, layer {setting.layer}"

        def run() -> dict[str, Any]:
            started = time.monotonic()
            facts = work()
            facts["seconds"] = round(time.monotonic() - started, 1)
            self.document["stages"][name] = facts
            # Written after each stage, so that a demo that is stopped keeps its results so far.
            write_json(self.out / "demo.json", self.document)
            return facts

        return Stage(kind, name, what, run, setting)

    def _load(self) -> dict[str, Any]:
        self.lm = as_language_model(self.model, device=self.device, dtype=self.dtype)
        return model_facts(self.lm)

    def _prompts(self) -> tuple[list[str], list[str]]:
        """The names of the tasks whose prompts the model answers, and the prompts."""
        tasks: dict[str, str | Task] = {self.task.name: self.task}
        tasks |= {name: name for name in self.size.reply_tasks if name not in tasks}
        prompts = reply_prompts(
            list(tasks.values()),
            contents=self.size.reply_contents,
            plain=self.size.plain,
            seed=self.seed,
        )
        return list(tasks), [prompt.text for prompt in prompts]

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

    def _rank(self, setting: Setting) -> dict[str, Any]:
        sae = self.saes[setting.layer]
        ranking = rank(self.lm, sae, self.task, setting.config, progress=self.progress)
        setting.ranking = ranking
        setting.plan = plan_from_ranking(self.lm, sae, ranking, top=15)
        facts: dict[str, Any] = {"latents": [asdict(latent) for latent in setting.plan.latents]}
        if ranking.replies_used:
            facts["replies_used"] = list(ranking.replies_used)
        return facts

    def _choose_dose(self, setting: Setting) -> dict[str, Any]:
        assert setting.plan is not None
        plan, setting.trials = calibrate(
            self.lm,
            self.task,
            setting.plan,
            setting.grid,
            rounds=self.size.rounds,
            decoding=Decoding(seed=self.seed),
            progress=self.progress,
        )
        setting.plan = plan
        save_plan(plan, self.plan_folder(setting))
        return {
            "trials": [trial.row() for trial in setting.trials],
            "chosen": {"k": len(plan.latents), "scale": plan.scale, "scope": plan.scope},
        }

    def plan_folder(self, setting: Setting) -> Path:
        """Where the plan of a setting is written to."""
        return self.out / f"plan-layer-{setting.layer}"

    def _evaluate(self, n: int) -> dict[str, Any]:
        plans = {one.label: one.plan for one in self.settings if one.plan is not None}
        sampling = Decoding(seed=self.seed)

        def arms(decoding: Decoding) -> list[Arm]:
            return evaluate(
                self.lm, self.task, plans, n=n, decoding=decoding, progress=self.progress
            )

        self.sampled = arms(sampling)
        self.greedy = arms(replace(sampling, temperature=0.0)) if self.size.greedy else ()
        return {
            "sampled": [arm.summary() for arm in self.sampled],
            "greedy": [arm.summary() for arm in self.greedy],
            "answers": {arm.name: [a.row() for a in arm.answers] for arm in self.sampled},
        }


def demo(
    out: str | Path,
    task: str | Path | Task = "french",
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
    """Run every stage from a model to an evaluated steering plan, and keep all files in a folder.

    The model answers prompts with the task's instruction and others; its activations at two layers
    train an SAE each; the latents that carry the instruction make a plan for each; doses are chosen
    on development contents; unsteered, prompted and steered answers to test contents are graded.

    Args:
        out: the folder; an error when it is not empty, unless `force` empties it.
        size: sizes of the stages: `FULL`, or `QUICK`, which is about a third of the work.

    Returns:
        What `demo.json` holds: `stages` with the figures of each by name, and `seconds`.

    Raises:
        UsageError: a folder in use, an unknown task.
        UserError: a model that cannot be loaded, a task without a check.
    """
    claim_output(Path(out), force=force)
    made = Demo(
        out,
        task,
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
