"""The reports of a pipeline: the page `report.html`, its numbers in `report.json`, and their table
in `report.md`. The page has the graph of stages as `graph_svg` draws it."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from megatron_r1.base.files import atomic_write
from megatron_r1.pipeline.graph import StageGraph
from megatron_r1.pipeline.graph_svg import Box, graph_svg
from megatron_r1.pipeline.results import LABELS, Spread, StageResult, read_results
from megatron_r1.pipeline.rl_plots import draw_rl_curves
from megatron_r1.pipeline.stages import PipelinePlan, PipelineStage
from megatron_r1.pipeline.status import StageState, StageStatus, all_statuses
from megatron_r1.reporting.formatting import format_duration, make_printable
from megatron_r1.reporting.pages import render_page

# A stage of several seeds is shown in the first of these states that one of them has.
BY_PROGRESS = [
    StageState.FAILED,
    StageState.STALE,
    StageState.PENDING,
    StageState.UNFINISHED,
    StageState.RUNNING,
]


class Cell(NamedTuple):
    """One number of the report's table, with its source.

    Attributes:
        text: the number as it is shown.
        source: the file and key of the number, and the number of each seed."""

    text: str
    source: str = ""


def write_pipeline_report(
    root: Path, title: str, command: str, plans: Sequence[PipelinePlan], graph: StageGraph
) -> Path:
    """Write `report.json`, `report.md` and `report.html` into `root`; return the path of the last.

    Args:
        root: the pipeline's folder.
        title: the title of the page.
        command: the one that is ending.
        plans: one per seed, of the same stages.
        graph: the stages and their order.

    Raises:
        UserError: it is not a folder.
    """
    statuses = [all_statuses(plan, graph) for plan in plans]
    report = collect_report(title or root.resolve().name, plans, graph, statuses) | {
        "command": command
    }
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    atomic_write(root / "report.json", text + "\n")
    runs = [run for stage in report["stages"].values() for run in stage["by_seed"].values()]
    stages_done = f"{sum(run['state'] == StageState.DONE for run in runs)} of {len(runs)}"
    time_spent = format_duration(sum(run["seconds"] or 0.0 for run in runs))
    shared_values = {"title": make_printable(report["title"]), "table": _result_table(report)}
    markdown = render_page(
        "pipeline/templates/report.md.jinja",
        **(
            report
            | shared_values
            | {"stages_done": f"{stages_done} stages done", "time": time_spent}
        ),
    )
    atomic_write(root / "report.md", markdown)
    html = render_page(
        "pipeline/templates/pipeline.html.jinja",
        **shared_values,
        pipeline_facts={
            "command": command,
            "stages": f"{stages_done} done",
            "seeds": ", ".join(map(str, report["seeds"])),
            "time": time_spent,
            "written": report["written"],
        },
        drawing=_draw_graph(report, graph),
        plots=draw_rl_curves(plans, graph),
        num_seeds=len(plans),
        seed=plans[0].seed,
        manifests={
            name: statuses[0][name].manifest
            for name in graph.order
            if "command" in statuses[0][name].manifest
        },
    )
    return atomic_write(root / "report.html", html)


def collect_report(
    title: str,
    plans: Sequence[PipelinePlan],
    graph: StageGraph,
    statuses: Sequence[Mapping[str, StageStatus]],
) -> dict[str, Any]:
    """Return the content of report.json.

    Args:
        title: the title of the page.
        plans: one plan per seed, of the same stages.
        graph: the stages and their order.
        statuses: for each plan, the status of each of its stages."""
    results = {
        name: [
            {} if by_name[name].state is StageState.FAILED else read_results(plan.folder_of(name))
            for plan, by_name in zip(plans, statuses, strict=True)
        ]
        for name in graph.order
    }
    row_of = {}
    for name in graph.order:
        row_of[name] = target = evaluated_stage(plans[0].stages[name], graph)
        by_seed = list(zip(results[target], results[name], strict=True)) if target else []
        # What a stage measured on held-out questions itself, or another evaluation of it, is not
        # replaced: another evaluation may ask other questions, or give no tool.
        if any(
            stage_results[key].heldout
            for stage_results, evaluation in by_seed
            for key in stage_results.keys() & evaluation.keys()
        ):
            row_of[name] = ""
            continue
        for stage_results, evaluation in by_seed:
            stage_results.update(evaluation)
    stages = {}
    for name in graph.order:
        stage = plans[0].stages[name]
        stages[name] = {
            "title": stage.title,
            "verb": stage.config.verb,
            "upstream": list(graph.upstream[name]),
            "evaluates": row_of[name],
            "figures": _result_spreads(results[name]),
            "by_seed": {
                str(plan.seed): {
                    "state": str(by_name[name].state),
                    "reasons": by_name[name].reason_lines,
                    "seconds": by_name[name].seconds,
                    "figures": {key: asdict(result) for key, result in seed_results.items()},
                }
                for plan, by_name, seed_results in zip(plans, statuses, results[name], strict=True)
            },
        }
    return {
        "title": title,
        "recipe": str(plans[0].path),
        "seeds": [plan.seed for plan in plans],
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "stages": stages,
    }


def evaluated_stage(stage: PipelineStage, graph: StageGraph) -> str:
    """Return the stage in whose row the results of this stage are shown; "" if this stage has a row
    of its own."""
    if stage.config.evaluates:
        return stage.config.evaluates
    if stage.config.verb != "eval":
        return ""
    heads = [ref.partition(".")[0] for place, ref in stage.references if place == "model.path"]
    return heads[0] if heads and heads[0] in graph.upstream else ""


def _result_spreads(by_seed: Sequence[Mapping[str, StageResult]]) -> dict[str, dict[str, Any]]:
    spreads = {}
    for name in {name: None for results in by_seed for name in results}:
        spread = Spread.from_values([results[name].value for results in by_seed if name in results])
        spreads[name] = {**vars(spread), "worded": spread.format(name)}
    return spreads


def _draw_graph(report: Mapping[str, Any], graph: StageGraph) -> str:
    boxes = {}
    for name, stage in report["stages"].items():
        runs = stage["by_seed"].values()
        states = {run["state"] for run in runs}
        state = next((str(s) for s in BY_PROGRESS if str(s) in states), str(StageState.DONE))
        seconds = [run["seconds"] for run in runs if run["seconds"] is not None]
        mean = format_duration(sum(seconds) / len(seconds)) if seconds else ""
        second_line = " · ".join(filter(None, [stage["verb"], state, mean]))
        boxes[name] = Box(state, stage["title"], second_line)
    return graph_svg(boxes, graph.upstream, graph.depths())


def _result_table(report: Mapping[str, Any]) -> dict[str, Any]:
    """Build the table from the content of report.json. Return a row per stage with results, its
    title first, and a column per result. spread: what the intervals are."""
    reported_stages = [s for s in report["stages"].values() if s["figures"] and not s["evaluates"]]
    names = {name: None for stage in reported_stages for name in stage["figures"]}
    columns = [n for n in LABELS if n in names] + [n for n in names if n not in LABELS]
    spread_note = "In brackets 95% intervals, where an evaluation gave them."
    if len(report["seeds"]) > 1:
        spread_note = "Means over seeds ± their standard deviation."
    rows = [
        [Cell(make_printable(s["title"])), *(_result_cell(s, name) for name in columns)]
        for s in reported_stages
    ]
    heads = [make_printable(LABELS.get(name, name)) for name in columns]
    return {"heads": heads, "rows": rows, "spread": spread_note}


def _result_cell(stage: Mapping[str, Any], name: str) -> Cell:
    if name not in stage["figures"]:
        return Cell("–")
    by_seed = {
        seed: StageResult(**run["figures"][name])
        for seed, run in stage["by_seed"].items()
        if name in run["figures"]
    }
    first, *later_results = by_seed.values()
    if not later_results:
        return Cell(first.format(name), first.source)
    seed_figures = ", ".join(
        f"seed {seed}: {result.format(name)}" for seed, result in by_seed.items()
    )
    return Cell(stage["figures"][name]["worded"], f"{first.source}; {seed_figures}")
