"""A chart that a notebook shows and that can be kept: what `.plot()` returns."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, repr=False)
class Chart:
    """A chart as SVG text."""

    svg: str
    title: str

    def __repr__(self) -> str:
        return f"Chart({self.title!r}; show it in a notebook, or .save('chart.svg'))"

    def _repr_html_(self) -> str:
        # On a white ground: a dark notebook would hide the axes of a chart that it does not know.
        return f'<div style="background:#fff;color:#1b1d20;display:inline-block">{self.svg}</div>'

    def save(self, path: str | Path) -> None:
        """Write the chart as an .svg file."""
        from saesteer.checkpoints.files import write_text

        write_text(path, self.svg)
