"""The page of a whole pipeline, `report.html`, its numbers, `report.json`, and their table in
Markdown, `report.md`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from megatron_r1.files import atomic_write
from megatron_r1.reporting.page import page
from megatron_r1.reporting.wording import duration, printable
from megatron_r1.workflow.curves import curves_section
from megatron_r1.workflow.drawing import Box, graph_svg
from megatron_r1.workflow.figures import Figure, Spread, figures_of
from megatron_r1.workflow.graph import Graph
from megatron_r1.workflow.plan import Plan, Stage
from megatron_r1.workflow.state import State, Status, examine_all
from megatron_r1.workflow.status import reasons
from megatron_r1.workflow.table import Cell, Table, as_markdown

TABLE_STYLE = (
    "<style>.wide{overflow-x:auto}.wide table{border-collapse:collapse;width:100%;font-size:14px}"
    ".wide th,.wide td{padding:6px 14px 6px 0;text-align:right;white-space:nowrap;"
    "border-bottom:1px solid var(--grid);font-variant-numeric:tabular-nums}"
    ".wide th{color:var(--muted);font-weight:500}.wide .left{text-align:left}"
    ".wide .command{white-space:normal;overflow-wrap:anywhere;font:12.5px/1.5 ui-monospace,"
    "SFMono-Regular,Menlo,Consolas,monospace}</style>"
)
# The least finished of several seeds is what a stage is called.
BY_PROGRESS = [State.FAILED, State.STALE, State.PENDING, State.UNFINISHED, State.RUNNING]

Statuses = Sequence[Mapping[str, Status]]


def write_report(root: Path, title: str, command: str, plans: Sequence[Plan], graph: Graph) -> Path:
    """Write `report.json`, `report.md` and `report.html` into `root`; returns the last one's path.

    command: the one that is ending. plans: one per seed, of the same stages.
    """
    statuses = [examine_all(plan, graph) for plan in plans]
    result = collect(title or root.resolve().name, plans, graph, statuses) | {"command": command}
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write(root / "report.json", text + "\n")
    atomic_write(root / "report.md", as_markdown(result))
    sections = [
        TABLE_STYLE,
        f"<h1>{escape(printable(result['title']))}</h1>",
        _facts(result),
        f'<div class="wide" style="margin-top:28px">{_drawing(result, graph)}</div>',
        _table(result),
        curves_section(plans, graph),
        _made(plans[0], graph, statuses[0]),
    ]
    body = "\n".join(section for section in sections if section)
    return atomic_write(root / "report.html", page(escape(printable(result["title"])), body))


def collect(title: str, plans: Sequence[Plan], graph: Graph, statuses: Statuses) -> dict[str, Any]:
    """Everything the page shows, as JSON can hold it."""
    found = {
        name: [
            {} if by_name[name].state is State.FAILED else figures_of(plan.folder_of(name))
            for plan, by_name in zip(plans, statuses, strict=True)
        ]
        for name in graph.order
    }
    for name in graph.order:  # an evaluation's numbers stand with what it evaluates
        target = evaluated(plans[0].stages[name], graph)
        if target:
            for own, more in zip(found[target], found[name], strict=True):
                own.update(more)
    stages = {}
    for name in graph.order:
        stage = plans[0].stages[name]
        stages[name] = {
            "title": stage.title,
            "verb": stage.config.verb,
            "upstream": list(graph.upstream[name]),
            "evaluates": evaluated(stage, graph),
            "figures": _spreads(found[name]),
            "by_seed": {
                str(plan.seed): {
                    "state": str(by_name[name].state),
                    "reasons": reasons(by_name[name]),
                    "seconds": by_name[name].seconds,
                    "figures": {key: figure.as_json() for key, figure in figures.items()},
                }
                for plan, by_name, figures in zip(plans, statuses, found[name], strict=True)
            },
        }
    return {
        "title": title,
        "recipe": str(plans[0].path),
        "seeds": [plan.seed for plan in plans],
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "stages": stages,
    }


def evaluated(stage: Stage, graph: Graph) -> str:
    """The stage whose row shows this one's figures; "" where it has its own."""
    if stage.config.evaluates:
        return stage.config.evaluates
    if stage.config.verb != "eval":
        return ""
    heads = [ref.partition(".")[0] for place, ref in stage.references if place == "model.path"]
    return heads[0] if heads and heads[0] in graph.upstream else ""


def _spreads(by_seed: Sequence[Mapping[str, Figure]]) -> dict[str, dict[str, Any]]:
    names = {name: None for figures in by_seed for name in figures}
    spreads = {}
    for name in names:
        spread = Spread.of([figures[name].value for figures in by_seed if name in figures])
        spreads[name] = {**vars(spread), "worded": spread.worded(name)}
    return spreads


def _facts(result: Mapping[str, Any]) -> str:
    runs = [run for stage in result["stages"].values() for run in stage["by_seed"].values()]
    done = sum(run["state"] == State.DONE for run in runs)
    seconds = sum(run["seconds"] or 0.0 for run in runs)
    facts = {
        "command": result["command"],
        "stages": f"{done} of {len(runs)} done",
        "seeds": ", ".join(map(str, result["seeds"])),
        "time": duration(seconds),
        "written": result["written"],
    }
    items = "".join(
        f"<span>{escape(name)} <b>{escape(printable(value))}</b></span>"
        for name, value in facts.items()
    )
    return f'<p class="facts">{items}</p>'


def _drawing(result: Mapping[str, Any], graph: Graph) -> str:
    boxes = {}
    for name, stage in result["stages"].items():
        runs = list(stage["by_seed"].values())
        state, took = _state(runs), _seconds(runs)
        second = " · ".join(filter(None, [stage["verb"], state, took]))
        boxes[name] = Box(state, stage["title"], second)
    return graph_svg(boxes, graph.upstream, graph.depths())


def _state(runs: Sequence[Mapping[str, Any]]) -> str:
    states = {run["state"] for run in runs}
    return next((str(state) for state in BY_PROGRESS if str(state) in states), str(State.DONE))


def _seconds(runs: Sequence[Mapping[str, Any]]) -> str:
    known = [run["seconds"] for run in runs if run["seconds"] is not None]
    return duration(sum(known) / len(known)) if known else ""


def _table(result: Mapping[str, Any]) -> str:
    table = Table.of(result)
    if not table.rows:
        return ""
    head = "".join(f"<th>{escape(text)}</th>" for text in table.heads)
    rows = [
        f'<tr><td class="left">{escape(title.text)}</td>{"".join(map(_cell, cells))}</tr>'
        for title, *cells in table.rows
    ]
    return (
        f"<h2>What each stage came to</h2><p>{table.spread} Point at a number to see where it is "
        f'from.</p><div class="wide"><table><tr><th class="left">stage</th>{head}</tr>'
        f"{''.join(rows)}</table></div>"
    )


def _cell(cell: Cell) -> str:
    title = f' title="{escape(cell.source, quote=True)}"' if cell.source else ""
    return f"<td{title}>{escape(cell.text)}</td>"


def _made(plan: Plan, graph: Graph, statuses: Mapping[str, Status]) -> str:
    """How each stage was made, to repeat it."""
    rows = []
    for name in graph.order:
        made = statuses[name].made
        if "command" not in made:
            continue
        commit = (made["git"] or {}).get("commit", "–")[:10]
        changed = "*" if (made["git"] or {}).get("changed") else ""
        cells = [
            f'<td class="left">{escape(name)}</td>',
            f'<td class="left">{escape(made["finished"])}</td>',
            f'<td class="left">{escape(commit + changed)}</td>',
            f'<td class="left">{escape(made["digest"])}</td>',
            f'<td class="left command">{escape(" ".join(made["command"]))}</td>',
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    if not rows:
        return ""
    heads = ("stage", "finished", "commit", "digest of its outputs", "command")
    head = "".join(f'<th class="left">{escape(text)}</th>' for text in heads)
    return (
        f"<details><summary>How they were made</summary><p>Seed {plan.seed}. Settings, inputs with "
        "their digests and versions: stage.json in each stage's folder. * the working tree had "
        f'changes.</p><div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
        "</details>"
    )
