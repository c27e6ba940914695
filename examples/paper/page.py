"""Writes docs/paper.md: every table with the published figures and ours, and whether the directions
agree."""

from pathlib import Path

from examples.paper.plots import draw
from examples.paper.results import Agreement, Results, Verdict, summary, verdict
from examples.paper.tables import Column, PaperRow, PaperTable, Published
from megatron_r1.base.files import atomic_write
from megatron_r1.pipeline.results import Spread
from megatron_r1.reporting.wording import duration, number, percent

NOTHING = "–"
INTRODUCTION = """# The paper's tables, on a laptop

`python -m examples.paper` makes this page: the comparisons of {paper}, with models of a few million
parameters on sums, riddles and small programs in two languages (examples/paper/paper.yaml). The
published figures have other models and other questions, so only the order of the rows can be
compared. A direction agrees if it holds here in every seed.

- *Ours*: mean over seeds ± standard deviation. Accuracy: sampled answers to held-out questions.
- Plots: filled marks are our mean and deviation, points the seeds, hollow marks what was published.
- Process reward models and tree search, which the paper tried and dropped, are left out.
"""


def write_page(path: Path, published: Published, results: Results) -> list[Path]:
    """Write the page, and its plots in a folder of its name; return all files.

    Missing figures leave empty cells, and the page states that it is incomplete."""
    files, sections, overview = [], [], ["| table | |", "|---|---|"]
    for name, table in published.tables.items():
        verdicts = [verdict(table, comparison, results) for comparison in table.compare]
        overview.append(f"| [{table.title}](#{_anchor(table.title)}) | {summary(verdicts)} |")
        plot, link = draw(table, results), ""
        if plot is not None:
            files.append(atomic_write(path.with_suffix("") / f"{name}.svg", plot))
            link = f"![{table.title}]({path.stem}/{name}.svg)"
        sections.append(_section(table, results, verdicts, link))
    head = [INTRODUCTION.format(paper=published.paper), _facts(results), *overview, ""]
    return [atomic_write(path, "\n".join([*head, *sections])), *files]


def _facts(results: Results) -> str:
    done, count, seconds = results.progress
    seeds, when = ", ".join(results.seeds), results.report["written"]
    facts = f"Seeds {seeds}; {done} of {count} stages done, in {duration(seconds)}; {when}.\n"
    if done == count:
        return facts
    missing = "the same command continues, and what is missing here has not been run"
    return f"{facts}\n**Not complete**: {missing}.\n"


def _anchor(title: str) -> str:
    """Return GitHub's anchor of a heading."""
    kept = "".join(char for char in title.lower() if char.isalnum() or char in " -_")
    return kept.replace(" ", "-")


def _section(table: PaperTable, results: Results, verdicts: list[Verdict], plot: str) -> str:
    parts = [
        f"## {table.title}",
        table.about.strip(),
        "\n".join(_rows(table, results)),
        f"Published: {table.source}.",
        f"**{summary(verdicts)}**",
        "\n".join(f"- {_sentence(table, found)}" for found in verdicts),
        plot,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _rows(table: PaperTable, results: Results) -> list[str]:
    published = {name for row in table.rows.values() for name in row.published}
    heads, rules = [""], ["---"]
    for name, column in table.columns.items():
        sides = ["published", "ours"] if name in published else ["ours"]
        heads += [f"{column.title}, {side}" for side in sides]
        rules += ["---:"] * len(sides)
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(rules)}|"]
    for row in table.rows.values():
        cells = [row.title]
        for name, column in table.columns.items():
            if name in published:
                cells.append(_published(row, name, column))
            cells.append(_ours(row, name, column, results))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _published(row: PaperRow, name: str, column: Column) -> str:
    value = row.published.get(name, NOTHING)
    if isinstance(value, str):
        return value
    return f"{value:g}%" if column.unit == "share" else f"{value:g}"


def _ours(row: PaperRow, name: str, column: Column, results: Results) -> str:
    spread = results.spread(row.ours[name]) if name in row.ours else None
    if spread is None:
        return NOTHING
    missing = len(results.seeds) - len(spread.values)
    partly = f" ({len(spread.values)} of {len(results.seeds)} seeds)" if missing else ""
    return worded(spread, column) + partly


def worded(spread: Spread, column: Column) -> str:
    """Format as `71.0% ± 1.2`, `0.610 ± 0.02` or `2 min 5 s ± 3.1 s`."""
    word = {"share": percent, "number": number, "seconds": duration}[column.unit]
    if spread.deviation is None:
        return word(spread.mean)
    deviations = {
        "share": f"{100 * spread.deviation:.1f}",
        "number": f"{spread.deviation:.2g}",
        "seconds": duration(spread.deviation),
    }
    return f"{word(spread.mean)} ± {deviations[column.unit]}"


def _sentence(table: PaperTable, found: Verdict) -> str:
    comparison, column = found.comparison, table.columns[found.comparison.column]
    above, below = table.rows[comparison.above].title, table.rows[comparison.below].title
    claim = f"{column.title}: {above} above {below}"
    if found.gap is None:
        return f"{claim}: {found.state}."
    seeds = f"in {found.num_in_order} of {len(found.gap.values)} seeds"
    sentence = f"{claim} {seeds} (by {_points(found.gap, column)}): {found.state}."
    if found.state is Agreement.AGREES:
        return sentence
    return f"{sentence} Different here: {comparison.otherwise}"


def _points(gap: Spread, column: Column) -> str:
    if column.unit != "share":
        return worded(gap, column)
    deviation = "" if gap.deviation is None else f" ± {100 * gap.deviation:.1f}"
    return f"{100 * gap.mean:+.1f}{deviation} points"
