"""The graph of stages as inline SVG: layers from top to bottom, edges round the boxes between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

BOX_WIDTH, BOX_HEIGHT = 196, 56
PASS_WIDTH = 14  # of an edge that passes a layer
GAP, LAYER_GAP, MARGIN = 26, 40, 6
SWEEPS = 4
MAX_CHARS = 24
INKS = {
    "done": "right",
    "running": "accent",
    "unfinished": "accent",
    "stale": "second",
    "failed": "wrong",
    "pending": "other",
}
"""State → colour of the page (`reporting.report_style`)."""


@dataclass(frozen=True)
class Box:
    """state: a key of INKS; first, second: its lines of text."""

    state: str
    first: str
    second: str


@dataclass(frozen=True)
class Node:
    """A stage; or, named after a layer, the place where an edge passes that."""

    name: str
    edge: tuple[str, str] | None = None


def graph_svg(
    boxes: Mapping[str, Box], upstream: Mapping[str, Sequence[str]], depths: Mapping[str, int]
) -> str:
    """The SVG. depths: layer of each stage, 0 at the top; larger than those of its upstream."""
    layers, ways = _layers(upstream, depths)
    _untangle(layers, ways)
    centres = _centres(layers)
    width = max(x + _width(node) / 2 for node, (x, _) in centres.items()) + MARGIN
    height = MARGIN * 2 + len(layers) * (BOX_HEIGHT + LAYER_GAP) - LAYER_GAP
    edges = "".join(_edge([centres[node] for node in way]) for way in ways)
    drawn = "".join(_box(box, *centres[Node(name)]) for name, box in boxes.items())
    return (
        f'<svg role="img" aria-label="stages" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'style="max-width:{width:.0f}px" font-size="13">'
        f'<g fill="none" stroke="var(--muted)" stroke-width="1.3">{edges}</g>{drawn}</svg>'
    )


def _layers(
    upstream: Mapping[str, Sequence[str]], depths: Mapping[str, int]
) -> tuple[list[list[Node]], list[list[Node]]]:
    """Nodes by layer, and of each edge the nodes it goes through."""
    layers: list[list[Node]] = [[] for _ in range(max(depths.values()) + 1)]
    for name, depth in depths.items():
        layers[depth].append(Node(name))
    ways = []
    for name, above in upstream.items():
        for start in above:
            way = [Node(start)]
            for layer in range(depths[start] + 1, depths[name]):
                way.append(Node(str(layer), (start, name)))
                layers[layer].append(way[-1])
            ways.append([*way, Node(name)])
    return layers, ways


def _untangle(layers: list[list[Node]], ways: Sequence[Sequence[Node]]) -> None:
    """Sort each layer by the mean place of its neighbours, downwards and upwards in turn (Sugiyama
    et al. 1981)."""
    above: dict[Node, list[Node]] = {}
    below: dict[Node, list[Node]] = {}
    for way in ways:
        for upper, lower in zip(way, way[1:], strict=False):
            above.setdefault(lower, []).append(upper)
            below.setdefault(upper, []).append(lower)
    for sweep in range(SWEEPS):
        neighbours = below if sweep % 2 else above
        for layer in reversed(layers) if sweep % 2 else layers:
            places = {n: (i + 0.5) / len(row) for row in layers for i, n in enumerate(row)}

            def wished(node: Node, places=places, neighbours=neighbours) -> float:
                near = [places[other] for other in neighbours.get(node, [])]
                return sum(near) / len(near) if near else places[node]

            layer.sort(key=wished)


def _centres(layers: Sequence[Sequence[Node]]) -> dict[Node, tuple[float, float]]:
    widths = [sum(map(_width, layer)) + GAP * (len(layer) - 1) for layer in layers]
    centres = {}
    for index, (layer, width) in enumerate(zip(layers, widths, strict=True)):
        x = MARGIN + (max(widths) - width) / 2
        y = MARGIN + index * (BOX_HEIGHT + LAYER_GAP) + BOX_HEIGHT / 2
        for node in layer:
            centres[node] = (x + _width(node) / 2, y)
            x += _width(node) + GAP
    return centres


def _width(node: Node) -> int:
    return PASS_WIDTH if node.edge else BOX_WIDTH


def _edge(points: Sequence[tuple[float, float]]) -> str:
    """Down from the bottom of the first to the top of the last, straight through the layers."""
    half = BOX_HEIGHT / 2
    path = ""
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        start, end = y0 + half, y1 - half
        middle = (start + end) / 2
        path += f"{'L' if path else 'M'}{x0:.1f},{start:.1f}"
        path += f"C{x0:.1f},{middle:.1f} {x1:.1f},{middle:.1f} {x1:.1f},{end:.1f}"
    x, y = points[-1][0], points[-1][1] - half
    return f'<path d="{path}"/><path d="M{x - 4:.1f},{y - 7:.1f}L{x:.1f},{y:.1f}l4,-7"/>'


def _box(box: Box, x: float, y: float) -> str:
    ink = f"var(--{INKS[box.state]})"
    left, top = x - BOX_WIDTH / 2, y - BOX_HEIGHT / 2
    dashes = ' stroke-dasharray="5 4"' if box.state == "pending" else ""
    return (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="9" '
        f'fill="var(--card)" stroke="{ink}" stroke-width="1.6"{dashes}/>'
        f'<text x="{x:.1f}" y="{y - 5:.1f}" text-anchor="middle" fill="var(--ink)" '
        f'font-weight="600">{_short(box.first)}</text>'
        f'<text x="{x:.1f}" y="{y + 15:.1f}" text-anchor="middle" fill="{ink}" '
        f'font-size="12">{_short(box.second)}</text>'
    )


def _short(text: str) -> str:
    return escape(text if len(text) <= MAX_CHARS else f"{text[: MAX_CHARS - 1]}…")
