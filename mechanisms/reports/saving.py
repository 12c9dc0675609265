"""Files of a reading: report.json, report.html, and tensors where there are many figures."""

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from saesteer.checkpoints.files import write_json, write_tensors, write_text

_PAGES = {
    "Trace": ("trace_page", "render_trace"),
    "TraceComparison": ("trace_page", "render_comparison"),
    "Attribution": ("attribution_page", "render_attribution"),
    "ProbeReport": ("probe_page", "render_probe"),
    "Clusters": ("probe_page", "render_clusters"),
    "Moves": ("probe_page", "render_moves"),
    "WeightDiff": ("diff_page", "render_diff"),
}


@runtime_checkable
class Reading(Protocol):
    """A result that can be written."""

    def document(self) -> dict[str, Any]: ...


def render_reading(result: Reading) -> str:
    """The HTML page of a result."""
    module, name = _PAGES[type(result).__name__]
    render: Callable[[Mapping[str, Any]], str] = getattr(
        import_module(f"{__package__}.{module}"), name
    )
    return render(result.document())


def save_reading(folder: str | Path, result: Reading) -> dict[str, Any]:
    """Write a result into a folder that exists; returns the document of report.json.

    A result's `tensors`, where it has some, go to effects.safetensors.
    """
    folder = Path(folder)
    tensors: Mapping[str, np.ndarray] = getattr(result, "tensors", {})
    if tensors:
        made = {name: torch.from_numpy(values).float() for name, values in tensors.items()}
        write_tensors(folder / "effects.safetensors", made, {})
    document = result.document()
    write_text(folder / "report.html", render_reading(result))
    write_json(folder / "report.json", document)
    return document
