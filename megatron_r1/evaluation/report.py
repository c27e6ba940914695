"""What an evaluation leaves for people: a table in the terminal, `report.html`, `eval.png`."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_r1.evaluation.estimators import Estimate
from megatron_r1.evaluation.summary import Summary
from megatron_r1.files import atomic_write
from megatron_r1.reporting.page import page
from megatron_r1.reporting.wording import number, percent, printable

LOG_WIDTH = 140
NUM_EXAMPLES = 2
MAX_CHARACTERS = 4_000
VERDICTS = ("right", "wrong", "truncated")

Sample = Mapping[str, Any]


def print_table(summaries: Sequence[Summary]) -> None:
    """One row per benchmark, its main numbers with their 95% intervals."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("benchmark", "questions", "pass@1", "pass@k", "cons@k", "tokens", "cut", "failed"):
        table.add_column(name, justify="left" if name == "benchmark" else "right", no_wrap=True)
    for summary in summaries:
        k, metrics, counts = summary.num_samples, summary.metrics, summary.counts
        table.add_row(
            summary.title,
            f"{counts['questions']:,} x {k}",
            worded("pass@1", metrics["pass@1"]),
            worded(f"pass@{k}", metrics[f"pass@{k}"], name=True) if k > 1 else "–",
            worded(f"cons@{k}", metrics[f"cons@{k}"], name=True) if f"cons@{k}" in metrics else "–",
            worded("length", metrics["length"]) if "length" in metrics else "–",
            percent(metrics["truncated"].value),
            f"{counts['ungraded']:,}",
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    console.print(table)


def worded(metric: str, estimate: Estimate, name: bool = False) -> str:
    """71.0% (66.2–75.8)"""
    is_length = metric == "length"
    value = number(estimate.value) if is_length else percent(estimate.value)
    prefix = f"@{metric.split('@')[1]}: " if name else ""
    if estimate.low is None or estimate.high is None:
        return prefix + value
    low, high = estimate.low, estimate.high
    interval = f"{low:,.0f}–{high:,.0f}" if is_length else f"{100 * low:.1f}–{100 * high:.1f}"
    return f"{prefix}{value} ({interval})"


def write_report(
    path: Path,
    title: str,
    facts: Mapping[str, str],
    summaries: Sequence[Summary],
    figure: Path,
    questions: Mapping[tuple[str, str], Mapping[str, Any]],
    samples: Iterable[Sample],
) -> Path:
    """One self-contained page: all numbers, the picture, and answers of every kind to look at.

    questions: (benchmark, id) → its line of questions.jsonl. samples: of samples.jsonl.
    """
    image = base64.b64encode(figure.read_bytes()).decode()
    items = "".join(
        f"<span>{escape(name)} <b>{escape(printable(value))}</b></span>"
        for name, value in facts.items()
    )
    body = [
        f"<h1>{escape(printable(title))}</h1>",
        f'<p class="facts">{items}</p>',
        "<h2>Results</h2><p>Means over questions; in brackets their 95% intervals, from resampling "
        "whole questions.</p>",
        f'<div class="settings">{"".join(_table(summary) for summary in summaries)}</div>',
        "<h2>What more samples buy</h2>"
        "<p>pass@k: a chance that one of k answers is right. cons@k: the majority of k is.</p>",
        f'<figure><img alt="pass@k and cons@k" style="max-width:100%" '
        f'src="data:image/png;base64,{image}"></figure>',
        _examples(questions, samples),
    ]
    return atomic_write(path, page(escape(printable(title)), "\n".join(body)))


def _table(summary: Summary) -> str:
    rows = [
        f"<tr><td>{escape(name)}</td><td>{escape(worded(name, value))}</td></tr>"
        for name, value in summary.metrics.items()
    ]
    rows += [
        f"<tr><td>{escape(name.replace('_', ' '))}</td><td>{value:,}</td></tr>"
        for name, value in summary.counts.items()
    ]
    head = f'<tr><th colspan="2">{escape(printable(summary.title))}</th></tr>'
    return f"<table>{head}{''.join(rows)}</table>"


def _examples(
    questions: Mapping[tuple[str, str], Mapping[str, Any]], samples: Iterable[Sample]
) -> str:
    """The first samples of each verdict in each benchmark; the rest is in samples.jsonl."""
    chosen: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        group = chosen.setdefault((str(sample["benchmark"]), _verdict(sample)), [])
        if len(group) < NUM_EXAMPLES and (sample["benchmark"], sample["id"]) in questions:
            group.append(sample)
    cards = [
        _card(questions[sample["benchmark"], sample["id"]], sample)
        for _, group in sorted(chosen.items())
        for sample in group
    ]
    intro = f"{NUM_EXAMPLES} of each kind; all are in samples.jsonl, their questions beside it."
    return f"<h2>Samples</h2><p>{intro}</p>{''.join(cards)}"


def _verdict(sample: Sample) -> str:
    if sample["truncated"]:
        return "truncated"
    return "right" if sample["reward"] == 1.0 else "wrong"


def _card(question: Mapping[str, Any], sample: Sample) -> str:
    verdict = _verdict(sample)
    text = str(sample["response"])
    if len(text) > MAX_CHARACTERS:
        half = MAX_CHARACTERS // 2
        left_out = f"\n[… {len(text) - MAX_CHARACTERS:,} characters left out …]\n"
        text = text[:half] + left_out + text[-half:]
    known = f"{sample['benchmark']} · {sample['id']} · sample {sample['index']}"
    asked = printable(str(question["question"])[:MAX_CHARACTERS], keep_newlines=True)
    length = "" if sample["length"] is None else f"<span>{sample['length']:,} tokens</span>"
    return (
        f'<p class="question">{escape(asked)}<small>truth: '
        f"{escape(printable(sample['truth']))}</small></p>"
        f'<article class="sample{" right" if sample["reward"] == 1.0 else ""}"><header>'
        f'<span class="verdict">{verdict}</span><span>{escape(printable(known))}</span>'
        f"<span>reward {sample['reward']:.3g}</span>{length}</header>"
        f'<div class="response">{escape(printable(text, keep_newlines=True)) or "(empty)"}</div>'
        f"<footer>{escape(printable(sample['reason']))}</footer></article>"
    )
