"""A diagram of routes: tokens across, blocks upwards, lines as wide as the mass they carry."""

from collections.abc import Sequence
from html import escape

from saesteer.sae.reports.svg import COLOURS

_Edge = tuple[tuple[int, int], tuple[int, int]]
_TEXT = 'font-family="system-ui, sans-serif" font-size="12" fill="currentColor"'


def path_chart(
    tokens: Sequence[str],
    n_layers: int,
    routes: Sequence[tuple[Sequence[Sequence[int]], int, float]],
    label: str,
) -> str:
    """SVG of routes given as (hops, token where it ends, mass); hops as in `Route`.

    Height 0 is the embeddings, height l + 1 the stream after block l. Orange adds to the logit,
    blue takes away; a line's title has its mass.
    """
    edges: dict[_Edge, float] = {}
    for hops, end, mass in routes:
        at, height = len(tokens) - 1, n_layers
        for layer, _, _, source in hops:
            for edge in (((at, height), (at, layer + 1)), ((at, layer + 1), (source, layer))):
                if edge[0] != edge[1]:
                    edges[edge] = edges.get(edge, 0.0) + mass
            at, height = source, layer
        if height:
            edge = ((at, height), (end, 0))
            edges[edge] = edges.get(edge, 0.0) + mass
    most = max(map(abs, edges.values()), default=0.0) or 1.0
    gap = max(16.0, min(56.0, 900 / max(1, len(tokens))))
    step = max(8.0, min(36.0, 420 / n_layers))
    left, top = 46.0, 12.0
    bottom = top + step * n_layers
    longest = max(map(len, tokens), default=0)

    def place(point: tuple[int, int]) -> tuple[float, float]:
        return left + gap * (point[0] + 0.5), bottom - step * point[1]

    body = []
    for height in range(0, n_layers + 1, max(1, round(n_layers / 10))):
        y = bottom - step * height
        name = "embed" if height == 0 else str(height - 1)
        body.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end" {_TEXT}>{name}</text>')
        body.append(
            f'<line x1="{left}" y1="{y:.1f}" x2="{left + gap * len(tokens):.1f}" y2="{y:.1f}" '
            'stroke="currentColor" stroke-opacity="0.12"/>'
        )
    for (one, other), mass in sorted(edges.items(), key=lambda item: abs(item[1])):
        (x1, y1), (x2, y2) = place(one), place(other)
        body.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
            f'stroke="{COLOURS[1] if mass > 0 else COLOURS[0]}" stroke-opacity="0.75" '
            f'stroke-width="{0.6 + 7 * abs(mass) / most:.1f}" stroke-linecap="round">'
            f"<title>{mass:+.4g}</title></line>"
        )
    for number, token in enumerate(tokens):
        x, y = place((number, 0))
        body.append(
            f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="end" {_TEXT} '
            f'transform="rotate(-60 {x:.1f} {y + 16:.1f})">{escape(token)}</text>'
        )
    width, height_px = left + gap * len(tokens) + 20, bottom + 24 + 6.0 * longest
    return (
        f'<svg viewBox="0 0 {width:.0f} {height_px:.0f}" width="{width:.0f}" '
        f'height="{height_px:.0f}" role="img" aria-label="{escape(label, quote=True)}" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(body)}</svg>'
    )
