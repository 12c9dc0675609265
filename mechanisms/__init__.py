"""How a behaviour is carried: patches between runs, routes, readings, and models whose mechanism
is known.

The names below are the public calls. Each loads its module on first use, so that importing the
package is fast. No sub-package has the name of a call.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saesteer.mechanisms.circuits.ablation import Ablation as Ablation
    from saesteer.mechanisms.circuits.ablation import evaluate_circuit as evaluate_circuit
    from saesteer.mechanisms.circuits.ablation import prune as prune
    from saesteer.mechanisms.circuits.circuit import find_circuit as find_circuit
    from saesteer.mechanisms.circuits.circuit import load_circuit as load_circuit
    from saesteer.mechanisms.circuits.crossing import cross_patch as cross_patch
    from saesteer.mechanisms.circuits.groups import Group as Group
    from saesteer.mechanisms.circuits.groups import read_groups as read_groups
    from saesteer.mechanisms.circuits.masks import learn_mask as learn_mask
    from saesteer.mechanisms.circuits.paths import path_effects as path_effects
    from saesteer.mechanisms.circuits.study import save_study as save_study
    from saesteer.mechanisms.circuits.study import study_circuit as study_circuit
    from saesteer.mechanisms.config import CircuitConfig as CircuitConfig
    from saesteer.mechanisms.config import LatentConfig as LatentConfig
    from saesteer.mechanisms.config import MaskConfig as MaskConfig
    from saesteer.mechanisms.config import PatchConfig as PatchConfig
    from saesteer.mechanisms.config import ToyConfig as ToyConfig
    from saesteer.mechanisms.config import VectorConfig as VectorConfig
    from saesteer.mechanisms.data.pairs import Pair as Pair
    from saesteer.mechanisms.data.pairs import load_pairs as load_pairs
    from saesteer.mechanisms.data.states import StateRow as StateRow
    from saesteer.mechanisms.data.states import read_state_rows as read_state_rows
    from saesteer.mechanisms.data.states import task_states as task_states
    from saesteer.mechanisms.latents.comparing import LatentDiff as LatentDiff
    from saesteer.mechanisms.latents.comparing import crosscoder_shares as crosscoder_shares
    from saesteer.mechanisms.latents.comparing import latent_diff as latent_diff
    from saesteer.mechanisms.latents.patching import compare_latents as compare_latents
    from saesteer.mechanisms.latents.patching import patch_latents as patch_latents
    from saesteer.mechanisms.latents.tracing import latent_edges as latent_edges
    from saesteer.mechanisms.latents.tracing import latent_trace as latent_trace
    from saesteer.mechanisms.patching.agreement import Agreement as Agreement
    from saesteer.mechanisms.patching.grid import patch as patch
    from saesteer.mechanisms.patching.knockout import knock_out as knock_out
    from saesteer.mechanisms.patching.vectors import instruction_vectors as instruction_vectors
    from saesteer.mechanisms.reading_config import AttributeConfig as AttributeConfig
    from saesteer.mechanisms.reading_config import DiffConfig as DiffConfig
    from saesteer.mechanisms.reading_config import ProbeConfig as ProbeConfig
    from saesteer.mechanisms.reading_config import SymbolsConfig as SymbolsConfig
    from saesteer.mechanisms.reading_config import TraceConfig as TraceConfig
    from saesteer.mechanisms.readings.attribution import attribute as attribute
    from saesteer.mechanisms.readings.attribution_result import (
        compare_attributions as compare_attributions,
    )
    from saesteer.mechanisms.readings.clustering import cluster as cluster
    from saesteer.mechanisms.readings.moving import move_centroids as move_centroids
    from saesteer.mechanisms.readings.separability import probe as probe
    from saesteer.mechanisms.readings.weights import diff as diff
    from saesteer.mechanisms.reports.latent_page import save_latents as save_latents
    from saesteer.mechanisms.reports.latent_result import LatentResult as LatentResult
    from saesteer.mechanisms.reports.patch_page import save_patch as save_patch
    from saesteer.mechanisms.reports.patch_result import PatchResult as PatchResult
    from saesteer.mechanisms.reports.saving import save_reading as save_reading
    from saesteer.mechanisms.reports.vector_page import save_vectors as save_vectors
    from saesteer.mechanisms.reports.vector_result import VectorResult as VectorResult
    from saesteer.mechanisms.routes.frozen import FrozenNetwork as FrozenNetwork
    from saesteer.mechanisms.routes.tracing import compare_traces as compare_traces
    from saesteer.mechanisms.routes.tracing import trace as trace
    from saesteer.mechanisms.toys.boxes_model import train_boxes as train_boxes
    from saesteer.mechanisms.toys.hand_built import hand_built as hand_built
    from saesteer.mechanisms.toys.instructions import train_instructions as train_instructions

_HOME = {
    "Ablation": "circuits.ablation",
    "evaluate_circuit": "circuits.ablation",
    "prune": "circuits.ablation",
    "find_circuit": "circuits.circuit",
    "load_circuit": "circuits.circuit",
    "cross_patch": "circuits.crossing",
    "Group": "circuits.groups",
    "read_groups": "circuits.groups",
    "learn_mask": "circuits.masks",
    "path_effects": "circuits.paths",
    "save_study": "circuits.study",
    "study_circuit": "circuits.study",
    "CircuitConfig": "config",
    "MaskConfig": "config",
    "LatentConfig": "config",
    "PatchConfig": "config",
    "VectorConfig": "config",
    "Pair": "data.pairs",
    "load_pairs": "data.pairs",
    "Agreement": "patching.agreement",
    "patch": "patching.grid",
    "patch_latents": "latents.patching",
    "compare_latents": "latents.patching",
    "LatentDiff": "latents.comparing",
    "latent_diff": "latents.comparing",
    "latent_edges": "latents.tracing",
    "latent_trace": "latents.tracing",
    "crosscoder_shares": "latents.comparing",
    "knock_out": "patching.knockout",
    "instruction_vectors": "patching.vectors",
    "save_latents": "reports.latent_page",
    "LatentResult": "reports.latent_result",
    "save_vectors": "reports.vector_page",
    "VectorResult": "reports.vector_result",
    "save_patch": "reports.patch_page",
    "PatchResult": "reports.patch_result",
    "ToyConfig": "config",
    "train_boxes": "toys.boxes_model",
    "hand_built": "toys.hand_built",
    "StateRow": "data.states",
    "read_state_rows": "data.states",
    "task_states": "data.states",
    "AttributeConfig": "reading_config",
    "DiffConfig": "reading_config",
    "ProbeConfig": "reading_config",
    "SymbolsConfig": "reading_config",
    "TraceConfig": "reading_config",
    "attribute": "readings.attribution",
    "compare_attributions": "readings.attribution_result",
    "cluster": "readings.clustering",
    "move_centroids": "readings.moving",
    "probe": "readings.separability",
    "diff": "readings.weights",
    "save_reading": "reports.saving",
    "FrozenNetwork": "routes.frozen",
    "compare_traces": "routes.tracing",
    "trace": "routes.tracing",
    "train_instructions": "toys.instructions",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
