"""Plots over steps as inline SVG, whose colors are CSS variables: they follow light and dark
pages."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK_NAMES = (
    "ink",
    "muted",
    "grid",
    "page",
    "accent",
    "second",
    "rollout",
    "reward",
    "train",
    "push",
    "other",
)
# Placeholder colors for matplotlib (#010101, …); in the SVG they become var(--name).
INKS = {name: "#" + 3 * f"{number:02x}" for number, name in enumerate(INK_NAMES, 1)}
MAX_POINTS = 300
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "megatron-r1",
    "font.size": 9,
    "axes.edgecolor": INKS["muted"],
    "axes.labelcolor": INKS["muted"],
    "text.color": INKS["ink"],
    "xtick.color": INKS["muted"],
    "ytick.color": INKS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": INKS["grid"],
    "grid.linewidth": 0.7,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.4,
}


@dataclass(frozen=True)
class Curve:
    """One quantity over steps; `values` may hold NaN where nothing was measured.

    Attributes:
        label: its name in the legend.
        steps: [points] float64, the steps of the points.
        values: [points] float64, their heights.
        ink: its color, of `INK_NAMES`.
        marker: draw points (held-out evaluations) instead of a smoothed line over the raw one.
        low: [points] lower ends of the error bars, NaN for none.
        high: [points] upper ends of the error bars, NaN for none.
        is_noisy: False for exact values, such as a schedule, which are drawn without smoothing."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    ink: str = "accent"
    marker: str = ""
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    is_noisy: bool = True


def curve_plot(
    name: str,
    curves: Sequence[Curve],
    size: tuple[float, float] = (3.4, 1.9),
    as_percent: bool = False,
    has_log_scale: bool = False,
    from_zero: bool = False,
) -> str:
    """Return the SVG of one or more curves over steps.

    Args:
        name: unique on the page.
        curves: the curves with their names and points.
        size: inches.
        as_percent: values are shares, shown as percentages.
        has_log_scale: whether the values' axis is logarithmic.
        from_zero: the values' axis begins at 0."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure_with_axes(size)
        for curve in curves:
            _draw_curve(axes, curve)
        if has_log_scale and any((curve.values > 0).any() for curve in curves):
            axes.set_yscale("log")
            axes.minorticks_off()
            axes.margins(y=0.15)
        elif from_zero:
            axes.set_ylim(bottom=0)
        if as_percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:.4g}%"))
            _bound_percent(axes, curves)
        elif not has_log_scale:
            axes.yaxis.set_major_formatter(FuncFormatter(_format_tick))
        if len(curves) > 1:
            axes.legend(loc="best")
        return _figure_svg(figure, name)


def stacked_plot(
    name: str,
    steps: np.ndarray,
    parts: Mapping[str, np.ndarray],
    size: tuple[float, float] = (10.7, 2.3),
) -> str:
    """Return the SVG of parts stacked over steps.

    Args:
        name: unique on the page.
        steps: [points], the training steps.
        parts: the name of an ink → [points], its values.
        size: width and height in inches."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure_with_axes(size)
        points = [downsample_curve(steps, np.nan_to_num(values)) for values in parts.values()]
        positions = points[0][0]
        heights = [values for _, values in points]
        colors = [INKS[part] for part in parts]
        if len(positions) == 1:
            bottom = 0.0
            for height, color, part in zip(heights, colors, parts, strict=True):
                axes.bar(positions, height, bottom=bottom, color=color, label=part, width=0.3)
                bottom += float(height[0])
            axes.set_xlim(positions[0] - 1, positions[0] + 1)
        else:
            axes.stackplot(positions, *heights, colors=colors, labels=list(parts), linewidth=0)
            axes.set_xlim(positions[0], positions[-1])
        # One slow step (a first compilation, a pause) must not flatten all the others.
        total = np.sum(heights, axis=0)
        axes.set_ylim(0, min(1.05 * total.max(), 2.5 * np.median(total)) or 1)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.3g} s"))
        axes.legend(loc="upper left", bbox_to_anchor=(0, 1.2), ncols=len(parts))
        return _figure_svg(figure, name)


def smooth_curve(values: np.ndarray) -> np.ndarray:
    """Return the centred moving mean over a twelfth of the run, ignoring NaN; [points] each."""
    half_width = max(1, len(values) // 24)
    padded_values = np.pad(values.astype(float), half_width, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded_values, 2 * half_width + 1)
    is_number = ~np.isnan(windows)
    counts = is_number.sum(axis=1)
    sums = np.where(is_number, windows, 0.0).sum(axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def downsample_curve(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a curve to at most MAX_POINTS means of equal shares, so that the file stays small."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    shares = zip(np.array_split(steps, MAX_POINTS), np.array_split(values, MAX_POINTS), strict=True)
    means = [
        (s.mean(), v[~np.isnan(v)].mean() if (~np.isnan(v)).any() else np.nan) for s, v in shares
    ]
    return np.array([s for s, _ in means]), np.array([v for _, v in means])


def _figure_with_axes(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.margins(x=0.02, y=0.08)
    return figure, axes


def _draw_curve(axes: Axes, curve: Curve) -> None:
    color = INKS[curve.ink]
    if curve.marker:
        face = color if curve.marker == "o" else INKS["page"]
        if curve.low is not None and curve.high is not None:
            axes.vlines(curve.steps, curve.low, curve.high, color=color, linewidth=1.2, alpha=0.6)
        axes.plot(
            curve.steps,
            curve.values,
            linestyle="none",
            marker=curve.marker,
            markersize=5,
            markerfacecolor=face,
            markeredgecolor=color,
            label=curve.label,
            zorder=4,
            clip_on=False,
        )
        return
    steps, raw_values = downsample_curve(curve.steps, curve.values)
    if len(steps) < 12:
        axes.plot(steps, raw_values, color=color, marker="o", markersize=3.5, label=curve.label)
        return
    if not curve.is_noisy:
        axes.plot(steps, raw_values, color=color, label=curve.label)
        return
    axes.plot(steps, raw_values, color=color, linewidth=0.8, alpha=0.3)
    axes.plot(steps, smooth_curve(raw_values), color=color, label=curve.label)


def _format_tick(value: float, _: int) -> str:
    if 0 < abs(value) < 0.001:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.5g}"


def _bound_percent(axes: Axes, curves: Sequence[Curve]) -> None:
    low, high = axes.get_ylim()
    numbers = np.concatenate([curve.values[~np.isnan(curve.values)] for curve in curves])
    if len(numbers) and numbers.max() > 0.5:
        axes.set_ylim(0, 1.03)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    elif low < 0:
        axes.set_ylim(0, max(high, 1e-4))


def _figure_svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Its <style> would hold for the whole page.
    svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
    # Several SVGs share one page: their ids must not meet.
    svg = re.sub(r'id="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'(xlink:href="|url\()#', rf"\g<1>#{name}-", svg)
    for ink, color in INKS.items():
        svg = svg.replace(color, f"var(--{ink})")
    svg = re.sub(r"font-family: [^;\"]+", "font-family: inherit", svg)
    # Full width of its figure on the page, at its own aspect ratio.
    svg = re.sub(r'<svg ([^>]*?)width="[^"]+"', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]+"', r"<svg \1", svg, count=1)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
