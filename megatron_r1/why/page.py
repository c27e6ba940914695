"""Writes why.html: the table of checks, the responses that a departure concerns most, and
departures over the position in the response."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.base.files import atomic_write
from megatron_r1.reporting import plots
from megatron_r1.reporting.formatting import format_number, format_percent, shorten_middle
from megatron_r1.reporting.pages import render_page
from megatron_r1.reporting.run_report import Plot
from megatron_r1.why.comparison import NOT_CHECKED, Comparison, ResponseIndex
from megatron_r1.why.record.recorded_step import RecordedStep
from megatron_r1.why.step_report import Report

MAX_SHOWN_RESPONSES = 6
"""The most responses on the page."""
MAX_TEXT_CHARACTERS = 3000
FIGURE_SIZE = (5.2, 2.7)


def write_page(report: Report, step: RecordedStep) -> Path:
    """Write why.html into the run's folder and return its path."""
    first = report.first_departure
    html = render_page(
        "reporting/templates/why.html.jinja",
        title=f"{step.folder.path.resolve().name}: why, step {report.step}",
        run_facts={
            "responses": f"{len(step.responses):,}",
            "groups": f"{len(step.groups):,}",
            "algorithm": step.config.rl.algorithm,
            "checks": f"{len(report.comparisons):,}",
        },
        outcome=f"{report.all_clear.capitalize()}."
        if first is None
        else f"First departure: {first}.",
        suspicions=report.suspicions,
        rows=[_comparison_cells(comparison) for comparison in report.comparisons],
        plots=_position_plots(report),
        responses=[_describe_response(step, index) for index in _worst_responses(report, step)],
    )
    return atomic_write(step.folder.path / "why.html", html)


def _comparison_cells(comparison: Comparison) -> dict[str, str]:
    """Return the cells of a check."""
    is_left_out = comparison.status == NOT_CHECKED
    text = comparison.reason if comparison.differs or is_left_out else comparison.description
    return {
        "family": comparison.family,
        "name": comparison.name,
        "status": comparison.status,
        "what": text,
        "distance": "" if math.isnan(comparison.distance) else format_number(comparison.distance),
        "tolerance": ""
        if math.isnan(comparison.tolerance)
        else format_number(comparison.tolerance),
        "source": comparison.tolerance_source,
        "concerned": f"{len(comparison.affected_responses):,}"
        if comparison.affected_responses
        else "",
        "loss_fraction": ""
        if math.isnan(comparison.loss_fraction)
        else format_percent(comparison.loss_fraction),
        "remedy": comparison.remedy if comparison.differs else "",
    }


def _position_plots(report: Report) -> list[Plot]:
    """Plot departures over position, where there are two points at least."""
    return [
        Plot(
            curve.label[:1].upper() + curve.label[1:],
            "mean |Δ| of log-probabilities over the position in the response",
            plots.curve_plot(
                f"position-{index}",
                [plots.Curve("mean |Δ|", np.array(curve.positions), np.array(curve.values))],
                FIGURE_SIZE,
                from_zero=True,
            ),
        )
        for index, curve in enumerate(report.curves)
        if len(curve.positions) > 1
    ]


def _worst_responses(report: Report, step: RecordedStep) -> list[ResponseIndex]:
    """Return the responses of the first departure that has any, those that depart furthest first;
    of those that depart alike, those with the largest advantages."""
    departing = (each for each in report.comparisons if each.differs)
    comparison = next((each for each in departing if each.affected_responses), None)
    if comparison is None:
        return []

    departures = dict(zip(comparison.affected_responses, comparison.departures, strict=False))

    def size(index: ResponseIndex) -> tuple[float, float]:
        advantage = step.advantages[index[0]][index[1]]
        return departures.get(index, 0.0), 0.0 if math.isnan(advantage) else abs(advantage)

    return sorted(comparison.affected_responses, key=size, reverse=True)[:MAX_SHOWN_RESPONSES]


def _describe_response(step: RecordedStep, index: ResponseIndex) -> dict[str, Any]:
    graded = step.responses[index]
    group = step.groups[index[0]]
    prompt = step.tokenizer.hf_tokenizer.decode(group.prompt_ids, skip_special_tokens=False)
    details = [
        f"group {index[0]}, response {index[1]}",
        f"reward {graded.reward:.3g}",
        f"advantage {step.advantages[index[0]][index[1]]:.3g}",
        f"{len(graded.response.token_ids):,} tokens",
        graded.response.finish_reason,
        graded.response.engine,
    ]
    truth = group.prompt.truth
    return {
        "prompt": shorten_middle(prompt, MAX_TEXT_CHARACTERS),
        "truth": "" if truth is None else str(truth)[:200],
        "details": [detail for detail in details if detail],
        "text": shorten_middle(graded.text, MAX_TEXT_CHARACTERS),
        "reason": graded.reason,
    }
