"""What an evaluation shows: a table in the terminal with the main numbers of each benchmark, and
the page `report.html` with all metrics, the figure and samples of every verdict."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_r1.base.files import atomic_write
from megatron_r1.evaluation.estimates import Estimate
from megatron_r1.evaluation.response import is_ungraded
from megatron_r1.evaluation.summary import Summary
from megatron_r1.reporting.formatting import (
    format_number,
    format_percent,
    make_printable,
    shorten_middle,
)
from megatron_r1.reporting.pages import render_page
from megatron_r1.reporting.samples import conversation_turns

LOG_WIDTH = 140
WIN_RATES = {"win_rate": "wins: ", "lc_win_rate": "at equal length: "}
NUM_EXAMPLES = 2
MAX_CHARACTERS = 4_000
SampleLine = Mapping[str, Any]


def print_table(summaries: Sequence[Summary]) -> None:
    """Print a row per benchmark, its main numbers with their 95% intervals."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("benchmark", "questions", "pass@1", "pass@k", "cons@k", "tokens", "cut", "failed"):
        table.add_column(name, justify="left" if name == "benchmark" else "right", no_wrap=True)
    for summary in summaries:
        k, metrics, counts = summary.num_samples, summary.metrics, summary.counts
        names = (*WIN_RATES, "")
        if "win_rate" not in metrics:
            names = ("pass@1", f"pass@{k}" if k > 1 else "", f"cons@{k}" if k > 1 else "")
        table.add_row(
            summary.title,
            f"{counts['questions']:,} x {k}",
            *(
                format_estimate(n, metrics[n], with_name=n != "pass@1") if n in metrics else "–"
                for n in names
            ),
            format_estimate("length", metrics["length"]) if "length" in metrics else "–",
            format_percent(metrics["truncated"].value),
            f"{counts['ungraded']:,}",
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    console.print(table)


def format_estimate(metric: str, estimate: Estimate, with_name: bool = False) -> str:
    """Return an estimate as "71.0% (66.2–75.8)".

    Args:
        metric: the metric's name.
        estimate: its value.
        with_name: whether "@k: " of "pass@k" stands in front, or "wins: " and
            "at equal length: "."""
    is_length = metric == "length"
    value = format_number(estimate.value) if is_length else format_percent(estimate.value)
    prefix = WIN_RATES.get(metric) or f"@{metric.partition('@')[2]}: " if with_name else ""
    if estimate.low is None or estimate.high is None:
        return prefix + value
    low, high = estimate.low, estimate.high
    interval = f"{low:,.0f}–{high:,.0f}" if is_length else f"{100 * low:.1f}–{100 * high:.1f}"
    return f"{prefix}{value} ({interval})"


def write_evaluation_report(
    path: Path,
    title: str,
    settings: Mapping[str, str],
    summaries: Sequence[Summary],
    figure: Path,
    questions: Mapping[tuple[str, str], Mapping[str, Any]],
    samples: Iterable[SampleLine],
) -> Path:
    """Write one self-contained page: all metrics, the figure, and samples of every verdict.

    Args:
        path: the page's file.
        title: its heading.
        settings: name → value, as shown.
        summaries: the summary of each benchmark.
        figure: the PNG of `write_figure`.
        questions: (benchmark, id) → its line of questions.jsonl.
        samples: lines of samples.jsonl.

    Raises:
        UserError: it is not a folder.
    """
    html = render_page(
        "evaluation/templates/evaluation.html.jinja",
        title=make_printable(title),
        settings=settings,
        summaries=summaries,
        worded=format_estimate,
        image=base64.b64encode(figure.read_bytes()).decode(),
        num_examples=NUM_EXAMPLES,
        examples=_choose_examples(questions, samples),
    )
    return atomic_write(path, html)


def _choose_examples(
    questions: Mapping[tuple[str, str], Mapping[str, Any]], samples: Iterable[SampleLine]
) -> list[dict[str, Any]]:
    """Return what the page shows of the first samples of each verdict in each benchmark, graded
    samples first. A sample whose grader failed counts only if no later line has its grade."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    ungraded: dict[tuple[str, str, int], tuple[list[dict[str, Any]], dict[str, Any]]] = {}
    for sample in samples:
        group = groups.setdefault((sample["benchmark"], _sample_verdict(sample)), [])
        question = questions.get((sample["benchmark"], sample["id"]))
        key = (sample["benchmark"], sample["id"], sample["index"])
        ungraded.pop(key, None)
        if question is None:
            continue
        if is_ungraded(sample):
            ungraded[key] = group, _shown_example(question, sample)
        elif len(group) < NUM_EXAMPLES:
            group.append(_shown_example(question, sample))
    for group, example in ungraded.values():
        if len(group) < NUM_EXAMPLES:
            group.append(example)
    return [example for _, group in sorted(groups.items()) for example in group]


def _shown_example(question: Mapping[str, Any], sample: SampleLine) -> dict[str, Any]:
    """Return what the page shows of one sample; its text is shortened."""
    source = f"{sample['benchmark']} · {sample['id']} · sample {sample['index']}"
    details = [source, f"reward {sample['reward']:.3g}"]
    if sample["length"] is not None:
        details.append(f"{sample['length']:,} tokens")
    response = make_printable(
        shorten_middle(sample["response"], MAX_CHARACTERS), keep_newlines=True
    )
    return {
        "question": make_printable(question["question"][:MAX_CHARACTERS], keep_newlines=True),
        "verdict": _sample_verdict(sample),
        "is_correct": sample["reward"] == 1.0,
        "details": details,
        "response": response or "(empty)",
        "turns": conversation_turns(sample),
        "truth": sample["truth"],
        "reason": sample["reason"],
    }


def _sample_verdict(sample: SampleLine) -> str:
    if sample["truncated"]:
        return "truncated"
    return "right" if sample["reward"] == 1.0 else "wrong"
