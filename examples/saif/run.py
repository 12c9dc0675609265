"""One experiment of the SAIF paper (arXiv 2502.11356), on any model and SAE.

    python examples/saif/run.py latents --sae runs/saif/sae/layer-20_dsae-4608_k-32_seed-0
    python examples/saif/run.py layers --sae runs/saif/sae/layer-10* runs/saif/sae/layer-29*
    python examples/saif/run.py latents --model google/gemma-2-2b-it \
        --sae gemma-scope-2b-pt-res-canonical:layer_25/width_16k/canonical

Every experiment varies one thing and holds the rest: `--read`, `--by`, `--k`, `--scale` and
`--scope` are the same for all its rows. Nothing is tuned here, so the contents are test contents.

    latents     how many latents: 1, 2, 5, 10, 15, 20, 30
    layers      one row an SAE of `--sae`
    width       the same, for SAEs of one layer
    position    instruction after the content (post) or before it (pre)
    read        where samples are read: last, template, span, reply
    beta        alpha = mu + beta sigma
    variants    ranked with every wording, or with one
    logit-bias  the share of the effect that a constant logit bias has alone
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from saesteer.checkpoints import load_sae
from saesteer.sae import load_model
from saesteer.steering import (
    ArmSpec,
    Decoding,
    Plan,
    RankConfig,
    load_task,
    logit_bias,
    plan_from_ranking,
    rank,
    run_arms,
)
from saesteer.steering.evaluation.intervals import paired_difference

COUNTS = (1, 2, 5, 10, 15, 20, 30)
BETAS = (-2.0, -1.0, 0.0, 1.0, 2.0)
EXPERIMENTS = ("latents", "layers", "width", "position", "read", "beta", "variants", "logit-bias")


def show(stage: str, done: int, total: int, note: str) -> None:
    print(f"\r{stage}: {done} of {total} {note}   ", end="", file=sys.stderr)


class Experiment:
    """Ranks as asked, and yields the arms that are compared."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.saes = [load_sae(path) for path in args.sae]
        self.lm = load_model(args.model or self.saes[0].spec.model_name)
        self.task = load_task(args.task)

    def plan(self, sae: Any, top: int, task: Any = None, **changes: Any) -> Plan:
        args = self.args
        given = {"read": args.read, "by": args.by, "contents": args.contents, **changes}
        if given["read"] == "reply" and given["by"] == "saif":
            given["by"] = "rate"  # sensitivity compares single positions, and replies have many
        config = RankConfig(**{key: value for key, value in given.items() if value is not None})
        ranking = rank(self.lm, sae, task or self.task, config, progress=show)
        return plan_from_ranking(self.lm, sae, ranking, top=top, scale=args.scale, scope=args.scope)

    def arms(self) -> Iterator[ArmSpec]:
        name, k, sae = self.args.experiment, self.args.k, self.saes[0]
        if name == "latents":
            plan = self.plan(sae, max(COUNTS))
            for count in COUNTS:
                if count <= len(plan.latents):
                    label = "1 latent" if count == 1 else f"{count} latents"
                    yield ArmSpec(label, "steered", plan=plan.top(count))
        elif name in ("layers", "width"):
            for one in self.saes:
                label = f"layer {one.spec.layer}, {one.spec.d_sae} latents"
                yield ArmSpec(label, "steered", plan=self.plan(one, k))
        elif name == "position":
            for where in ("post", "pre"):
                yield ArmSpec(where, "steered", plan=self.plan(sae, k, position=where))
        elif name == "read":
            for where in ("last", "template", "span", "reply"):
                yield ArmSpec(where, "steered", plan=self.plan(sae, k, read=where))
        elif name == "beta":
            plan = self.plan(sae, k)
            for beta in BETAS:
                changed = plan.with_changes(beta=beta)
                yield ArmSpec(f"beta {beta:g}", "steered", plan=changed)
        elif name == "variants":
            alone = dataclasses.replace(
                self.task, variants=tuple(v for v in self.task.variants if v.use == "evaluate")
            )
            yield ArmSpec("every wording", "steered", plan=self.plan(sae, k))
            yield ArmSpec("one wording", "steered", plan=self.plan(sae, k, task=alone))
        else:
            plan = self.plan(sae, k)
            contents = self.task.contents["test"][: self.args.n]
            yield ArmSpec("edit", "steered", plan=plan)
            bias = logit_bias(self.lm, plan, contents)
            yield ArmSpec("logit bias alone", "logit-bias", logit_bias=bias)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--sae", nargs="+", required=True, help="folders, or RELEASE:ID")
    parser.add_argument("--model", help="default: the one the SAE names")
    parser.add_argument("--task", default="french")
    parser.add_argument("--read", default="last", help="the paper's choice: last")
    parser.add_argument("--by", default="saif", help="the paper's choice: saif")
    parser.add_argument("--contents", type=int, default=32, help="train contents to rank with")
    parser.add_argument("--k", type=int, default=15, help="latents, where they are not varied")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--scope", default="generation")
    parser.add_argument("--n", type=int, default=20, help="test contents")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/saif/results"))
    args = parser.parse_args(argv)

    experiment = Experiment(args)
    contents = list(experiment.task.contents["test"][: args.n])
    specs = [
        ArmSpec("unsteered", "unsteered"),
        ArmSpec("prompted", "prompted", prompted=True),
        *experiment.arms(),
    ]
    decoding = Decoding(temperature=args.temperature)
    arms = run_arms(experiment.lm, experiment.task, contents, specs, decoding, progress=show)
    print(file=sys.stderr)
    for arm in arms:
        print(f"{arm.name:26} follows {arm.follows}  strict {arm.strict}  loops {arm.degenerate}")
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {key: value for key, value in vars(args).items() if key != "out"}
    facts["sae"] = [
        {"layer": sae.spec.layer, "d_sae": sae.spec.d_sae, "k": sae.spec.k}
        for sae in experiment.saes
    ]
    facts["model"] = experiment.lm.name
    floor = [float(hit) for hit in arms[0].hits("follows")]
    rows = []
    for arm in arms:
        gain = paired_difference([float(hit) for hit in arm.hits("follows")], floor)
        rows.append({**arm.summary(), "gain": dataclasses.asdict(gain)})
    report = {"settings": facts, "arms": rows}
    path = args.out / f"{args.experiment}-{args.task}-layer-{facts['sae'][0]['layer']}.json"
    path.write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
