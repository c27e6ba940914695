"""The drawing of a pipeline's graph of stages, as inline SVG of its report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from megatron_r1.reporting.pages import render_page

BOX_WIDTH, BOX_HEIGHT = 196, 56
PASS_WIDTH = 14
"""Width that an edge takes in a layer that it passes through."""
GAP, LAYER_GAP, MARGIN = 26, 40, 6
SWEEPS = 4
"""Passes of `_reduce_crossings` over all layers, downwards and upwards in turn."""
MAX_CHARS = 24
"""The most characters of a line that fit into a box."""
BOX_INKS = {
    "done": "right",
    "running": "accent",
    "unfinished": "accent",
    "stale": "second",
    "failed": "wrong",
    "pending": "other",
}
"""State → color of the page (`reporting/templates/style.css.jinja`)."""


@dataclass(frozen=True)
class Box:
    """One box of the drawing: a stage.

    Attributes:
        state: the stage's state, a key of `BOX_INKS`.
        first: the upper line of text in the box.
        second: the lower one."""

    state: str
    first: str
    second: str


@dataclass(frozen=True)
class GraphNode:
    """A stage; or, named after a layer, the point where an edge passes through that layer."""

    name: str
    edge: tuple[str, str] | None = None

    @property
    def width(self) -> int:
        """Width of the node's box, or of an edge that passes through its layer."""
        return PASS_WIDTH if self.edge else BOX_WIDTH


Paths = Sequence[Sequence[GraphNode]]
"""The nodes that each edge goes through, from top to bottom."""


def graph_svg(
    boxes: Mapping[str, Box], upstream: Mapping[str, Sequence[str]], depths: Mapping[str, int]
) -> str:
    """Return the graph of stages as inline SVG: layers from top to bottom, edges between the boxes.

    Args:
        boxes: stage → its box.
        upstream: stage → the stages that it needs.
        depths: layer of each stage, 0 at the top; a stage is below all stages that it needs."""
    layers, paths = _lay_out_layers(upstream, depths)
    _reduce_crossings(layers, paths)
    centres = _node_centres(layers)
    return render_page(
        "pipeline/templates/graph.svg.jinja",
        width=max(x + node.width / 2 for node, (x, _) in centres.items()) + MARGIN,
        height=MARGIN * 2 + len(layers) * (BOX_HEIGHT + LAYER_GAP) - LAYER_GAP,
        edges=[_edge_path([centres[node] for node in path]) for path in paths],
        boxes=[
            (box, BOX_INKS[box.state], *centres[GraphNode(name)]) for name, box in boxes.items()
        ],
        box_width=BOX_WIDTH,
        box_height=BOX_HEIGHT,
        max_chars=MAX_CHARS,
    )


def _lay_out_layers(
    upstream: Mapping[str, Sequence[str]], depths: Mapping[str, int]
) -> tuple[list[list[GraphNode]], Paths]:
    """Return the nodes by layer, and the paths of all edges."""
    layers: list[list[GraphNode]] = [[] for _ in range(max(depths.values()) + 1)]
    for name, depth in depths.items():
        layers[depth].append(GraphNode(name))
    paths = []
    for name, parents in upstream.items():
        for start in parents:
            passed_layers = range(depths[start] + 1, depths[name])
            passes = [GraphNode(str(layer), (start, name)) for layer in passed_layers]
            for layer, node in zip(passed_layers, passes, strict=True):
                layers[layer].append(node)
            paths.append([GraphNode(start), *passes, GraphNode(name)])
    return layers, paths


def _reduce_crossings(layers: list[list[GraphNode]], paths: Paths) -> None:
    """Sort each layer by the mean position of its neighbors, downwards and upwards in turn
    (Sugiyama et al. 1981)."""
    parents: dict[GraphNode, list[GraphNode]] = {}
    children: dict[GraphNode, list[GraphNode]] = {}
    for path in paths:
        for upper, lower in pairwise(path):
            parents.setdefault(lower, []).append(upper)
            children.setdefault(upper, []).append(lower)
    for sweep in range(SWEEPS):
        neighbors = children if sweep % 2 else parents
        for layer in reversed(layers) if sweep % 2 else layers:
            position = {n: (i + 0.5) / len(row) for row in layers for i, n in enumerate(row)}
            target = {
                node: fmean(position[neighbor] for neighbor in neighbors.get(node, [node]))
                for node in layer
            }
            layer.sort(key=target.__getitem__)


def _node_centres(layers: Sequence[Sequence[GraphNode]]) -> dict[GraphNode, tuple[float, float]]:
    widths = [sum(n.width for n in layer) + GAP * (len(layer) - 1) for layer in layers]
    centres = {}
    for index, (layer, width) in enumerate(zip(layers, widths, strict=True)):
        x = MARGIN + (max(widths) - width) / 2
        y = MARGIN + index * (BOX_HEIGHT + LAYER_GAP) + BOX_HEIGHT / 2
        for node in layer:
            centres[node] = (x + node.width / 2, y)
            x += node.width + GAP
    return centres


def _edge_path(points: Sequence[tuple[float, float]]) -> tuple[str, tuple[float, float]]:
    """Return the path of an edge and its end: from the bottom of the first node to the top of the
    last, straight through the layers between."""
    half_height = BOX_HEIGHT / 2
    path = ""
    for (x0, y0), (x1, y1) in pairwise(points):
        start, end = y0 + half_height, y1 - half_height
        middle_y = (start + end) / 2
        path += f"{'L' if path else 'M'}{x0:.1f},{start:.1f}"
        path += f"C{x0:.1f},{middle_y:.1f} {x1:.1f},{middle_y:.1f} {x1:.1f},{end:.1f}"
    x, y = points[-1]
    return path, (x, y - half_height)
