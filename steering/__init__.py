"""Instruction tasks, ranking, steering plans, the generation hook and evaluation.

The names below are the public calls of the package. Each loads its module on first use, so that
importing the package is fast. No sub-package has the name of a call, because importing it would
replace the call in this namespace.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saesteer.steering.demonstration.pipeline import DemoSize as DemoSize
    from saesteer.steering.demonstration.pipeline import demo as demo
    from saesteer.steering.doses.nats import Dose as Dose
    from saesteer.steering.doses.nats import dose_plan as dose_plan
    from saesteer.steering.doses.sweep import Budget as Budget
    from saesteer.steering.doses.sweep import Grid as Grid
    from saesteer.steering.doses.sweep import calibrate as calibrate
    from saesteer.steering.doses.sweep import sweep as sweep
    from saesteer.steering.doses.sweep_files import ranked_plans as ranked_plans
    from saesteer.steering.doses.sweep_files import save_sweep as save_sweep
    from saesteer.steering.doses.sweep_files import sweep_document as sweep_document
    from saesteer.steering.evaluation.arms import ArmSpec as ArmSpec
    from saesteer.steering.evaluation.arms import Decoding as Decoding
    from saesteer.steering.evaluation.arms import evaluate as evaluate
    from saesteer.steering.evaluation.arms import run_arms as run_arms
    from saesteer.steering.evaluation.compare import CompareConfig as CompareConfig
    from saesteer.steering.evaluation.compare import compare as compare
    from saesteer.steering.evaluation.controls import logit_bias as logit_bias
    from saesteer.steering.evaluation.controls import mean_difference_plan as mean_difference_plan
    from saesteer.steering.evaluation.controls import random_plan as random_plan
    from saesteer.steering.evaluation.damage import NeutralProbe as NeutralProbe
    from saesteer.steering.evaluation.judge import Judge as Judge
    from saesteer.steering.evaluation.side_by_side import generate_beside as generate_beside
    from saesteer.steering.exchange.conversion import export_plan as export_plan
    from saesteer.steering.exchange.conversion import import_vectors as import_vectors
    from saesteer.steering.finding.find import FindConfig as FindConfig
    from saesteer.steering.finding.find import find as find
    from saesteer.steering.finding.found import Found as Found
    from saesteer.steering.finding.found import save_found as save_found
    from saesteer.steering.grades.grade import Grader as Grader
    from saesteer.steering.grades.grade import Grades as Grades
    from saesteer.steering.grades.grade import grade as grade
    from saesteer.steering.grades.instructed import instructed_scores as instructed_scores
    from saesteer.steering.hooking.arrangement import ByRow as ByRow
    from saesteer.steering.hooking.chats import encode_chat as encode_chat
    from saesteer.steering.hooking.generation import SteeredText as SteeredText
    from saesteer.steering.hooking.generation import generate_steered as generate_steered
    from saesteer.steering.hooking.hook import SteerReport as SteerReport
    from saesteer.steering.hooking.hook import steer as steer
    from saesteer.steering.hooking.latent_changes import LatentChange as LatentChange
    from saesteer.steering.hooking.latent_changes import read_back as read_back
    from saesteer.steering.hooking.latent_values import with_gate as with_gate
    from saesteer.steering.ifeval.benchmark import evaluate_ifeval as evaluate_ifeval
    from saesteer.steering.ifeval.benchmark import load_ifeval as load_ifeval
    from saesteer.steering.plans.condition import Condition as Condition
    from saesteer.steering.plans.directions import mean_difference as mean_difference
    from saesteer.steering.plans.directions import plan_from_directions as plan_from_directions
    from saesteer.steering.plans.from_sae import plan_from_latents as plan_from_latents
    from saesteer.steering.plans.plan import Plan as Plan
    from saesteer.steering.plans.plan import PlannedLatent as PlannedLatent
    from saesteer.steering.plans.plan import PlanPart as PlanPart
    from saesteer.steering.plans.plan_file import load_plan as load_plan
    from saesteer.steering.plans.plan_file import save_plan as save_plan
    from saesteer.steering.ranking.marks import planned_latents as planned_latents
    from saesteer.steering.ranking.marks import task_marks as task_marks
    from saesteer.steering.ranking.rank import RankConfig as RankConfig
    from saesteer.steering.ranking.rank import lens_tokens as lens_tokens
    from saesteer.steering.ranking.rank import plan_from_ranking as plan_from_ranking
    from saesteer.steering.ranking.rank import rank as rank
    from saesteer.steering.ranking.ranking_file import ranking_document as ranking_document
    from saesteer.steering.ranking.ranking_file import save_ranking as save_ranking
    from saesteer.steering.reports.evaluation_report import render_html as render_html
    from saesteer.steering.reports.evaluation_report import report_document as report_document
    from saesteer.steering.reports.plan_evaluation import Evaluation as Evaluation
    from saesteer.steering.reports.plan_evaluation import TaskPlans as TaskPlans
    from saesteer.steering.reports.plan_evaluation import evaluate_plans as evaluate_plans
    from saesteer.steering.reports.plan_evaluation import plans_by_task as plans_by_task
    from saesteer.steering.tasks.task import Task as Task
    from saesteer.steering.tasks.task import builtin_tasks as builtin_tasks
    from saesteer.steering.tasks.task import load_task as load_task
    from saesteer.steering.tasks.task import reply_prompts as reply_prompts

_HOME = {
    "ByRow": "hooking.arrangement",
    "generate_beside": "evaluation.side_by_side",
    "Condition": "plans.condition",
    "FindConfig": "finding.find",
    "find": "finding.find",
    "Found": "finding.found",
    "save_found": "finding.found",
    "Dose": "doses.nats",
    "dose_plan": "doses.nats",
    "LatentChange": "hooking.latent_changes",
    "read_back": "hooking.latent_changes",
    "encode_chat": "hooking.chats",
    "mean_difference": "plans.directions",
    "plan_from_directions": "plans.directions",
    "with_gate": "hooking.latent_values",
    "SteeredText": "hooking.generation",
    "generate_steered": "hooking.generation",
    "DemoSize": "demonstration.pipeline",
    "demo": "demonstration.pipeline",
    "Budget": "doses.sweep",
    "Grid": "doses.sweep",
    "calibrate": "doses.sweep",
    "sweep": "doses.sweep",
    "ranked_plans": "doses.sweep_files",
    "save_sweep": "doses.sweep_files",
    "sweep_document": "doses.sweep_files",
    "CompareConfig": "evaluation.compare",
    "compare": "evaluation.compare",
    "mean_difference_plan": "evaluation.controls",
    "random_plan": "evaluation.controls",
    "NeutralProbe": "evaluation.damage",
    "evaluate_ifeval": "ifeval.benchmark",
    "load_ifeval": "ifeval.benchmark",
    "Judge": "evaluation.judge",
    "Grades": "grades.grade",
    "Grader": "grades.grade",
    "grade": "grades.grade",
    "instructed_scores": "grades.instructed",
    "render_html": "reports.evaluation_report",
    "report_document": "reports.evaluation_report",
    "Evaluation": "reports.plan_evaluation",
    "TaskPlans": "reports.plan_evaluation",
    "evaluate_plans": "reports.plan_evaluation",
    "plans_by_task": "reports.plan_evaluation",
    "ArmSpec": "evaluation.arms",
    "Decoding": "evaluation.arms",
    "run_arms": "evaluation.arms",
    "logit_bias": "evaluation.controls",
    "evaluate": "evaluation.arms",
    "export_plan": "exchange.conversion",
    "import_vectors": "exchange.conversion",
    "SteerReport": "hooking.hook",
    "steer": "hooking.hook",
    "Plan": "plans.plan",
    "PlannedLatent": "plans.plan",
    "load_plan": "plans.plan_file",
    "PlanPart": "plans.plan",
    "plan_from_latents": "plans.from_sae",
    "save_plan": "plans.plan_file",
    "planned_latents": "ranking.marks",
    "task_marks": "ranking.marks",
    "RankConfig": "ranking.rank",
    "lens_tokens": "ranking.rank",
    "plan_from_ranking": "ranking.rank",
    "rank": "ranking.rank",
    "ranking_document": "ranking.ranking_file",
    "save_ranking": "ranking.ranking_file",
    "Task": "tasks.task",
    "builtin_tasks": "tasks.task",
    "load_task": "tasks.task",
    "reply_prompts": "tasks.task",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
