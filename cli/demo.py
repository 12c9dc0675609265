"""`saesteer demo`: the main job, start to end, on a small instruct model."""

import sys
import textwrap
import time
from argparse import Namespace, _ArgumentGroup
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saesteer.checkpoints.files import claim_output, write_json
from saesteer.checkpoints.model_files import DEFAULT_MODEL, WHEEL_ALIAS
from saesteer.cli.flags import add_common
from saesteer.cli.output import (
    amount,
    duration,
    number,
    paint,
    print_json,
    print_table,
    program,
)
from saesteer.cli.parser import VerbParser
from saesteer.cli.progress import Report, reporting

if TYPE_CHECKING:
    from saesteer.checkpoints.sae_file import SAE
    from saesteer.sae.model.language_model import LanguageModel
    from saesteer.steering.doses.sweep import Grid
    from saesteer.steering.evaluation.arms import Arm
    from saesteer.steering.plans.plan import Plan
    from saesteer.steering.ranking.rank import RankConfig, Ranking
    from saesteer.steering.tasks.task import Task

EXAMPLE = "saesteer demo --quick -o runs/first"


@dataclass(frozen=True)
class Size:
    """How much of everything: chosen for two CPU cores and some minutes."""

    reply_tasks: tuple[str, ...]
    reply_contents: int
    plain: int
    harvest_tokens: int
    train_tokens: int
    rank_contents: int
    latents: tuple[int, ...]
    scales: tuple[float, ...]
    scopes: tuple[str, ...]
    rounds: tuple[tuple[int, int], ...]
    greedy: bool
    latents_per_d_model: int = 8


FULL = Size(
    reply_tasks=("german", "json"),
    reply_contents=48,
    plain=2,
    harvest_tokens=160_000,
    train_tokens=480_000,
    rank_contents=48,
    latents=(1, 3, 5),
    scales=(1.0, 1.5, 2.0),
    scopes=("generation", "all"),
    rounds=((10, 4), (55, 1)),
    greedy=True,
)
QUICK = Size(
    reply_tasks=("json",),
    reply_contents=24,
    plain=2,
    harvest_tokens=64_000,
    train_tokens=192_000,
    rank_contents=24,
    latents=(1, 3, 5),
    scales=(1.0, 1.5, 2.0),
    scopes=("generation",),
    rounds=((8, 3), (24, 1)),
    greedy=False,
)
TEST_CONTENTS = 40
EXAMPLES = 3


def add_flags(parser: VerbParser) -> None:
    group: _ArgumentGroup = parser.add_argument_group("demo")
    group.add_argument("--model", metavar="NAME", help=f"the model (default: {DEFAULT_MODEL})")
    group.add_argument(
        "--task", metavar="NAME", default="french",
        help="the built-in instruction to find and steer by (default: french)",
    )  # fmt: skip
    group.add_argument("--quick", action="store_true", help="about a third of the work")
    add_common(
        parser,
        out="folder for every artefact (default: runs/demo-<time>)",
        force="replace what an earlier demo left in --out",
    )


def run(args: Namespace) -> int:
    started = time.monotonic()
    out = Path(args.out or f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}")
    claim_output(out, force=args.force)
    with reporting(args) as progress:
        demo = Demo(args, out, progress)
        for stage in (demo.get_model, demo.harvest, demo.train, demo.steer):
            stage()
    document = {**demo.document, "complete": True, "seconds": round(time.monotonic() - started, 1)}
    write_json(out / "demo.json", document)
    if args.json:
        print_json(document)
    else:
        demo.print_end(document["seconds"])
    return 0


@dataclass
class Setting:
    """One way to steer: where it reads and ranks, and which doses are tried."""

    name: str
    layer: int
    config: "RankConfig"
    grid: "Grid"
    sae: "SAE | None" = None
    ranking: "Ranking | None" = None
    plan: "Plan | None" = None


@dataclass
class Demo:
    """The stages of the demo, what they made, and what they print."""

    args: Namespace
    out: Path
    progress: Report
    document: dict[str, Any] = field(
        default_factory=lambda: {"schema_version": 1, "complete": False, "stages": {}}
    )

    def __post_init__(self) -> None:
        self.size = QUICK if self.args.quick else FULL
        self.seed = self.args.seed or 0
        self.number = 0
        write_json(self.out / "demo.json", self.document)

    # --- what is printed ------------------------------------------------------------------------

    def say(self, text: str = "") -> None:
        """A line of the result, at once: the next stage may take minutes."""
        if not self.args.json:
            # Progress keeps library output off stdout; results belong there.
            print(text, file=sys.__stdout__, flush=True)

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[dict[str, Any]]:
        """Announce a stage, time it, and keep its figures in the document."""
        self.number += 1
        self.say(f"\n{paint(f'{self.number}. {name}', 'bold')}  {what}")
        figures: dict[str, Any] = {}
        started = time.monotonic()
        yield figures
        figures["seconds"] = round(time.monotonic() - started, 1)
        self.progress.end()
        self.document["stages"][name] = figures
        # Written after each stage: a demo that is stopped leaves what it found so far.
        write_json(self.out / "demo.json", self.document)
        self.say(paint(f"   took {duration(figures['seconds'])}", "dim"))

    # --- the stages -----------------------------------------------------------------------------

    def get_model(self) -> None:
        from saesteer.sae import load_model
        from saesteer.sae.runs.facts import model_facts
        from saesteer.steering.tasks.task import load_task

        self.task: Task = load_task(self.args.task)
        name = self.args.model or DEFAULT_MODEL
        with self.stage("model", f"load {name} (its first use converts the weights once)") as facts:
            self.progress.say(f"loading {name}")
            self.lm: LanguageModel = load_model(
                name, device=self.args.device, dtype=self.args.dtype
            )
            facts.update(model_facts(self.lm))
            where = f"{facts['dtype']} on {self.lm.device}"
            self.say(
                f"   {self.lm.name}: {self.lm.n_layers} blocks, d_model {self.lm.d_model}, "
                f"{where}, weights {self.lm.fingerprint}"
            )
        # Two thirds of the way up: late enough to act on words, early enough to be read again.
        self.middle, self.last = 2 * self.lm.n_layers // 3, self.lm.n_layers - 1

    def harvest(self) -> None:
        from saesteer.sae import HarvestConfig, harvest
        from saesteer.sae.config import TextConfig
        from saesteer.steering.tasks.task import reply_prompts

        size = self.size
        tasks = tuple(dict.fromkeys((self.task.name, *size.reply_tasks)))
        prompts = reply_prompts(
            [self.task.name, *(name for name in tasks if name != self.task.name)],
            contents=size.reply_contents,
            plain=size.plain,
            seed=self.seed,
        )
        what = (
            f"the model answers {len(prompts)} prompts ({', '.join(tasks)}, plain); replies and "
            f"the Python reference go through it once; layers {self.middle} and {self.last} stay"
        )
        with self.stage("harvest", what) as facts:
            manifest = harvest(
                self.lm,
                self.out / "activations",
                HarvestConfig(
                    layers=(self.middle, self.last),
                    tokens=size.harvest_tokens,
                    text=TextConfig(epochs=2, replies_share=0.45, seed=self.seed),
                ),
                replies=[prompt.text for prompt in prompts],
                replies_folder=self.out / "replies",
                progress=self.progress,
                warn=self.progress.warn,
            )
            excluded = manifest["excluded"]
            rate = manifest["tokens"] / max(manifest["seconds"], 1e-9)
            facts.update(
                tokens=manifest["tokens"],
                excluded=excluded,
                tokens_per_second=round(rate, 1),
                reply_prompts=len(prompts),
            )
            self.say(
                f"   {amount(manifest['tokens'])} activations per layer at {amount(rate)} "
                f"tokens/s; left out: {amount(excluded['special'])} special tokens, "
                f"{amount(excluded['sinks'])} attention sinks"
            )

    def train(self) -> None:
        from saesteer.checkpoints import load_sae
        from saesteer.sae import TrainConfig, train

        size = self.size
        d_sae = size.latents_per_d_model * self.lm.d_model
        what = f"two TopK SAEs, {d_sae} latents, k 32, on {amount(size.train_tokens)} activations"
        with self.stage("train", what) as facts:
            runs = train(
                self.out / "sae",
                TrainConfig(d_sae=(d_sae,), tokens=size.train_tokens, seed=self.seed),
                activations=self.out / "activations",
                device=self.args.device,
                progress=self.progress,
            )
            rows = []
            self.saes = {}
            for made in runs:
                layer, final = made["sae"]["layer"], made["final"]
                self.saes[layer] = load_sae(made["folder"], device=self.lm.device)
                facts[f"layer {layer}"] = final
                rows.append(
                    [
                        str(layer),
                        f"{final['fvu']:.3f}",
                        f"{final['l0']:.1f}",
                        f"{100 * final['dead_fraction']:.1f} %",
                        made["folder"],
                    ]
                )
            self._table(["layer", "FVU", "L0", "dead latents", "folder"], rows, "folder")

    def steer(self) -> None:
        settings = self._settings()
        for setting in settings:
            self._rank(setting)
        for setting in settings:
            self._choose_dose(setting)
        self._evaluate(settings)

    def _settings(self) -> list[Setting]:
        from saesteer.steering.doses.sweep import Grid
        from saesteer.steering.ranking.rank import RankConfig

        size = self.size
        contents = size.rank_contents
        return [
            Setting(
                "steered",
                self.middle,
                RankConfig(read="reply", contents=contents, seed=self.seed),
                Grid(k=size.latents, scale=size.scales, scope=size.scopes),
            ),
            # As in the paper: last block, last token of the user's text, sensitivity, fifteen.
            Setting(
                "paper's setting",
                self.last,
                RankConfig(read="last", by="saif", contents=contents, seed=self.seed),
                Grid(k=(15,), scale=(0.5, *size.scales), scope=("generation",)),
            ),
        ]

    def _rank(self, setting: Setting) -> None:
        from saesteer.steering.ranking.rank import plan_from_ranking, rank

        config = setting.config
        where = "the model's replies" if config.read == "reply" else "the prompt's last word"
        what = f"latents of layer {setting.layer} for {self.task.instruction!r}, read at {where}"
        with self.stage(f"rank, layer {setting.layer}", what) as facts:
            setting.sae = self.saes[setting.layer]
            setting.ranking = rank(self.lm, setting.sae, self.task, config, progress=self.progress)
            setting.plan = plan_from_ranking(self.lm, setting.sae, setting.ranking, top=15)
            facts["latents"] = [asdict(latent) for latent in setting.plan.latents]
            used = setting.ranking.replies_used
            if used:
                facts["replies_used"] = list(used)
                self.say(f"   {used[0]} of {used[1]} instructed replies pass the check and count")
            rows = [
                [
                    str(latent.id),
                    number(latent.score, 3),
                    number(latent.mu, 3),
                    number(latent.sigma, 3),
                    " ".join(repr(token) for token in latent.lens),
                ]
                for latent in setting.plan.latents[:5]
            ]
            self._table(["latent", "score", "mu", "sigma", "lens tokens"], rows, "lens tokens")

    def _choose_dose(self, setting: Setting) -> None:
        from saesteer.steering.doses.sweep import calibrate
        from saesteer.steering.evaluation.arms import Decoding
        from saesteer.steering.plans.plan_file import save_plan

        assert setting.plan is not None
        tried = len(setting.grid.plans(setting.plan))
        what = f"of {tried} settings for layer {setting.layer}, on development contents"
        with self.stage(f"choose dose, layer {setting.layer}", what) as facts:
            setting.plan, trials = calibrate(
                self.lm,
                self.task,
                setting.plan,
                setting.grid,
                rounds=self.size.rounds,
                decoding=Decoding(seed=self.seed),
                progress=self.progress,
            )
            rows = [trial.row() for trial in trials]
            facts["trials"] = rows
            final = [row for row in rows if row["n"] == rows[-1]["n"]]
            final.sort(key=lambda row: (-row["loose"]["value"], row["degenerate"]["value"]))
            self._table(
                ["k", "scale", "scope", "||delta||/||h||", "loose", "degenerate", "contents"],
                [
                    [
                        str(row["k"]),
                        number(row["scale"]),
                        row["scope"],
                        f"{row['relative_dose']:.2f}",
                        f"{row['loose']['value']:.2f}",
                        f"{row['degenerate']['value']:.2f}",
                        str(row["n"]),
                    ]
                    for row in final
                ],
                "scope",
            )
            folder = self.out / f"plan-layer-{setting.layer}"
            save_plan(setting.plan, folder)
            plan = setting.plan
            chosen = f"k {len(plan.latents)}, scale {plan.scale:g}, scope {plan.scope}"
            facts["chosen"] = {"k": len(plan.latents), "scale": plan.scale, "scope": plan.scope}
            self.say(f"   chosen: {chosen}; written to {folder}")

    def _evaluate(self, settings: list[Setting]) -> None:
        from saesteer.steering.evaluation.arms import Decoding, evaluate

        plans = {
            f"{setting.name}, layer {setting.layer}": setting.plan
            for setting in settings
            if setting.plan is not None
        }
        n = min(TEST_CONTENTS, len(self.task.contents.get("test", ())))
        sampled = Decoding(seed=self.seed)
        with self.stage("evaluate", f"on {n} test contents that nothing above has seen") as facts:
            arms = evaluate(
                self.lm, self.task, plans, n=n, decoding=sampled, progress=self.progress
            )
            greedy: list[Arm] = []
            if self.size.greedy:
                once_more = replace(sampled, temperature=0.0)
                greedy = evaluate(
                    self.lm, self.task, plans, n=n, decoding=once_more, progress=self.progress
                )
            facts["sampled"] = [arm.summary() for arm in arms]
            facts["greedy"] = [arm.summary() for arm in greedy]
            facts["answers"] = {arm.name: [a.row() for a in arm.answers] for arm in arms}
        self._print_examples(arms)
        self._print_rates(f"sampled, temperature {sampled.temperature:g}", arms)
        if greedy:
            self._print_rates("greedy, the same doses", greedy)

    # --- tables ---------------------------------------------------------------------------------

    def _table(self, headers: list[str], rows: list[list[str]], left: str) -> None:
        if not self.args.json:
            print_table(headers, rows, left, indent=3, stream=sys.__stdout__)

    def _print_examples(self, arms: "list[Arm]") -> None:
        self.say(f"\n{paint('Side by side', 'bold')}  (the first {EXAMPLES} test contents)")
        for i in range(min(EXAMPLES, len(arms[0].answers))):
            self.say(f"\n   {paint(arms[0].answers[i].content, 'cyan')}")
            for arm in arms:
                graded = arm.answers[i]
                verdict = {"A": "A, follows on topic", "B": "B, follows", "C": "C, does not follow"}
                label = verdict[graded.grade.value]
                if graded.degenerate:
                    label = "C, degenerate"
                self.say(f"   {paint(arm.name, 'bold')} [{label}]")
                text = " ".join(graded.output.split()) or "(nothing)"
                self.say(textwrap.indent(textwrap.fill(text, 92), "      "))

    def _print_rates(self, decoding: str, arms: "list[Arm]") -> None:
        # Figures of de-quantised weights are not those of the original model.
        weights = ", de-quantised 4-bit weights" if self.lm.name == WHEEL_ALIAS else ""
        about = f"{self.lm.name}{weights}; {decoding}; 95 % Wilson intervals"
        self.say(f"\n{paint('Rates', 'bold')}  ({about})")
        rows = [[arm.name, str(arm.loose), str(arm.strict), str(arm.degenerate)] for arm in arms]
        self._table(["arm", "loose", "strict", "degenerate"], rows, "arm")

    def print_end(self, seconds: float) -> None:
        """What the figures mean, and what to do next."""
        evaluated = self.document["stages"]["evaluate"]["sampled"]
        rate: Callable[[int], float] = lambda i: evaluated[i]["loose"]["value"]  # noqa: E731
        prompted, steered = rate(1), rate(2)
        self.say(
            "\nloose: the check passes on the answer or one of its loose readings, and the answer "
            "is not\ndegenerate; strict: it passes as it is, and is on topic; degenerate: one "
            "4-gram makes\nup more than a fifth of the answer."
        )
        if prompted:
            self.say(
                f"Steering reaches {100 * steered / prompted:.0f} % of the prompted loose rate "
                f"({steered:.2f} of {prompted:.2f}); unsteered it is {rate(0):.2f}."
            )
        self.say(f"\nAll of it took {duration(seconds)}; every artefact is in {self.out}.")
        model = f" --model {self.args.model}" if self.args.model else ""
        self.say(
            f"{paint('next:', 'cyan')} {program()} steer{model} --plan {self.out}/plan-layer-"
            f"{self.middle} -p 'The bridge was closed for the winter.' --baseline --temperature 0.7"
        )
