"""Bars made of characters: a history as columns, and parts of a whole as shares of a row."""

from collections.abc import Sequence

BAR_GLYPHS = " ▁▂▃▄▅▆▇█"


def bar_columns(values: Sequence[float | None], width: int, height: int, top: float) -> list[str]:
    """Return `height` rows of at most `width` characters, the top row first.

    Each value has a column until the width is full; longer histories are cut into `width` equal
    shares, of which each column shows the mean. A missing value leaves its column empty; a present
    one shows at least a hairline.

    Args:
        values: the values; None: missing.
        width: the most columns.
        height: the number of rows.
        top: the value of a full column; an empty one is 0."""
    bars = _resample_values(values, width)
    rows = []
    for row in reversed(range(height)):
        cells = []
        for value in bars:
            eighths = 0 if value is None else max(1, round(8 * height * min(value / top, 1.0)))
            cells.append(BAR_GLYPHS[min(8, max(0, eighths - 8 * row))])
        rows.append("".join(cells))
    return rows


def bar_shares(parts: Sequence[float], width: int) -> list[int]:
    """Split `width` cells in proportion to `parts`, by largest remainders.

    The result sums to `width`, or is all zeros where `parts` sum to 0."""
    total = sum(parts)
    if total <= 0:
        return [0] * len(parts)
    widths = [width * part / total for part in parts]
    cells = [int(share) for share in widths]
    by_remainder = sorted(range(len(parts)), key=lambda i: cells[i] - widths[i])
    for i in by_remainder[: width - sum(cells)]:
        cells[i] += 1
    return cells


def _resample_values(values: Sequence[float | None], width: int) -> list[float | None]:
    count = len(values)
    if count <= width:
        return list(values)
    means: list[float | None] = []
    for column in range(width):
        share = values[column * count // width : (column + 1) * count // width]
        numbers = [value for value in share if value is not None]
        means.append(sum(numbers) / len(numbers) if numbers else None)
    return means
