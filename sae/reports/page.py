"""The frame of every HTML page: one style for light and dark screens, and where figures come from.

Pages are self-contained: no script from elsewhere, no font, no network.
"""

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, *, title: str, provenance: Mapping[str, Any], **values: Any) -> str:
    """A page from one of the templates. All text is escaped; SVG has to be marked safe.

    Args:
        template: name of a file in `templates/`.
        provenance: what the page was made of and with, shown at its foot.
        values: what the template names.
    """
    page = _environment().get_template(template)
    return page.render(title=title, provenance=provenance, **values)


def fragment(template: str, **values: Any) -> str:
    """A part of a page, for a notebook, from one of the templates."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("saesteer.sae.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=False,
    )
