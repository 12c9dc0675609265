"""How the main objects show themselves in a notebook or a prompt: in a line, or a small table."""

from html import escape
from typing import Any


class Shown:
    """Gives a class a short `__repr__`, and `_repr_html_` for notebooks, from its `_facts`.

    A dataclass needs `repr=False`: it would print every tensor otherwise.
    """

    def _facts(self) -> dict[str, Any]:
        """What is worth knowing at a glance, by name, in a few words or numbers each."""
        raise NotImplementedError

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={value}" for name, value in self._known().items())
        return f"{type(self).__name__}({inside})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr><th scope="row" style="text-align:left">{escape(name)}</th>'
            f'<td style="text-align:left">{escape(str(value))}</td></tr>'
            for name, value in self._known().items()
        )
        return f"<table><caption>{escape(type(self).__name__)}</caption>{rows}</table>"

    def _known(self) -> dict[str, Any]:
        return {name: value for name, value in self._facts().items() if value not in (None, "")}


def rounded(value: float | None) -> str | None:
    """A number in three digits; None stays None."""
    return None if value is None else f"{value:.3g}"
