"""Instruction tasks, ranking, steering plans, the generation hook and evaluation.

The names below are the public calls of this room. Each loads its module on first use, so importing
the package costs nothing. No module bears the name of a call: importing a submodule binds its name
in the package, and would hide the call.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saesteer.steering.applying import SteeredText as SteeredText
    from saesteer.steering.applying import generate_steered as generate_steered
    from saesteer.steering.arrangement import ByRow as ByRow
    from saesteer.steering.beside import generate_beside as generate_beside
    from saesteer.steering.calibration import Budget as Budget
    from saesteer.steering.calibration import Grid as Grid
    from saesteer.steering.calibration import calibrate as calibrate
    from saesteer.steering.calibration import sweep as sweep
    from saesteer.steering.chats import encode_chat as encode_chat
    from saesteer.steering.comparison import CompareConfig as CompareConfig
    from saesteer.steering.comparison import compare as compare
    from saesteer.steering.controls import logit_bias as logit_bias
    from saesteer.steering.controls import mean_difference_plan as mean_difference_plan
    from saesteer.steering.controls import random_plan as random_plan
    from saesteer.steering.damage import NeutralProbe as NeutralProbe
    from saesteer.steering.directions import mean_difference as mean_difference
    from saesteer.steering.directions import plan_from_directions as plan_from_directions
    from saesteer.steering.dosing import Dose as Dose
    from saesteer.steering.dosing import dose_plan as dose_plan
    from saesteer.steering.evaluation import ArmSpec as ArmSpec
    from saesteer.steering.evaluation import Decoding as Decoding
    from saesteer.steering.evaluation import evaluate as evaluate
    from saesteer.steering.evaluation import run_arms as run_arms
    from saesteer.steering.exchange import export_plan as export_plan
    from saesteer.steering.exchange import import_vectors as import_vectors
    from saesteer.steering.hook import SteerReport as SteerReport
    from saesteer.steering.hook import steer as steer
    from saesteer.steering.ifeval import evaluate_ifeval as evaluate_ifeval
    from saesteer.steering.ifeval import load_ifeval as load_ifeval
    from saesteer.steering.judge import Judge as Judge
    from saesteer.steering.latent_changes import LatentChange as LatentChange
    from saesteer.steering.latent_changes import read_back as read_back
    from saesteer.steering.latent_reading import with_gate as with_gate
    from saesteer.steering.plan import Plan as Plan
    from saesteer.steering.plan import PlannedLatent as PlannedLatent
    from saesteer.steering.plan import plan_from_latents as plan_from_latents
    from saesteer.steering.plan_file import load_plan as load_plan
    from saesteer.steering.plan_file import save_plan as save_plan
    from saesteer.steering.ranking import RankConfig as RankConfig
    from saesteer.steering.ranking import lens_tokens as lens_tokens
    from saesteer.steering.ranking import plan_from_ranking as plan_from_ranking
    from saesteer.steering.ranking import rank as rank
    from saesteer.steering.report import render_html as render_html
    from saesteer.steering.report import report_document as report_document
    from saesteer.steering.tasks import Task as Task
    from saesteer.steering.tasks import builtin_tasks as builtin_tasks
    from saesteer.steering.tasks import load_task as load_task
    from saesteer.steering.tasks import reply_prompts as reply_prompts

_HOME = {
    "ByRow": "arrangement",
    "generate_beside": "beside",
    "Dose": "dosing",
    "dose_plan": "dosing",
    "LatentChange": "latent_changes",
    "read_back": "latent_changes",
    "encode_chat": "chats",
    "mean_difference": "directions",
    "plan_from_directions": "directions",
    "with_gate": "latent_reading",
    "SteeredText": "applying",
    "generate_steered": "applying",
    "Budget": "calibration",
    "Grid": "calibration",
    "calibrate": "calibration",
    "sweep": "calibration",
    "CompareConfig": "comparison",
    "compare": "comparison",
    "mean_difference_plan": "controls",
    "random_plan": "controls",
    "NeutralProbe": "damage",
    "evaluate_ifeval": "ifeval",
    "load_ifeval": "ifeval",
    "Judge": "judge",
    "render_html": "report",
    "report_document": "report",
    "ArmSpec": "evaluation",
    "Decoding": "evaluation",
    "run_arms": "evaluation",
    "logit_bias": "controls",
    "evaluate": "evaluation",
    "export_plan": "exchange",
    "import_vectors": "exchange",
    "SteerReport": "hook",
    "steer": "hook",
    "Plan": "plan",
    "PlannedLatent": "plan",
    "load_plan": "plan_file",
    "plan_from_latents": "plan",
    "save_plan": "plan_file",
    "RankConfig": "ranking",
    "lens_tokens": "ranking",
    "plan_from_ranking": "ranking",
    "rank": "ranking",
    "Task": "tasks",
    "builtin_tasks": "tasks",
    "load_task": "tasks",
    "reply_prompts": "tasks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
