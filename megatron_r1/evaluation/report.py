"""The results of an evaluation: every metric of every benchmark with its interval, from the logged
samples; a table in the terminal, `report.html`, and the figure of pass@k and cons@k over the number
of samples."""

import asyncio
import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from r1_grading import RewardPool
from r1_grading.reading import Part, Reading
from rich.console import Console
from rich.table import Table

from megatron_r1.base.files import atomic_write, atomic_writer
from megatron_r1.data.prompt import Prompt
from megatron_r1.evaluation.estimates import (
    Estimate,
    estimate,
    pass_at_k,
    powers_up_to,
    subsets,
)
from megatron_r1.evaluation.prompt_sets import PromptSet
from megatron_r1.evaluation.response import is_thought_opened, is_ungraded
from megatron_r1.evaluation.response_log import ResponseLog
from megatron_r1.evaluation.voting import (
    Vote,
    can_vote,
    expects_number,
    group_answers,
    read_vote,
    voted_reward,
)
from megatron_r1.evaluation.win_rates import length_difference, win_rates
from megatron_r1.reporting.formatting import (
    format_number,
    format_percent,
    printable,
    shorten_middle,
)
from megatron_r1.reporting.plots import render_page
from megatron_r1.reporting.samples import conversation


@dataclass(frozen=True)
class Summary:
    """The results of one benchmark.

    Attributes:
        title: the benchmark's name in results.
        num_samples: responses to each question.
        metrics: name → estimate over questions; "length" is in tokens, the others are fractions.
        counts: the numbers of questions and samples.
        pass_at_k: k → pass@k; empty if the metrics are win rates.
        cons_at_k: k → cons@k; empty if the metrics are win rates."""

    title: str
    num_samples: int
    metrics: dict[str, Estimate]
    counts: dict[str, int]
    pass_at_k: dict[int, Estimate]
    cons_at_k: dict[int, Estimate]

    def as_json(self) -> dict[str, Any]:
        """Return samples per question, metrics with intervals and counts, for a result file."""
        return {
            "samples_per_question": self.num_samples,
            "metrics": {name: value.as_json() for name, value in self.metrics.items()},
            "counts": self.counts,
        }


@dataclass(frozen=True)
class LoggedResponse:
    """The parts of a logged response that metrics are computed from; its text stays on disk."""

    reward: float
    length: int | None
    is_truncated: bool
    is_ungraded: bool
    vote: Vote | None
    length_difference: int

    @classmethod
    def from_line(
        cls, line: Mapping[str, Any], prompt: Prompt, part: Part, reading: Reading
    ) -> Self:
        """Return the response of a line of the log.

        Args:
            line: a line of samples.jsonl.
            prompt: the prompt that it responds to.
            part: the part of a response that a judge compares.
            reading: `rewards.reading`."""
        text, thought_opened = line["response"], is_thought_opened(line)
        truth_is_number = expects_number(prompt)
        return cls(
            reward=float(line["reward"]),
            length=line["length"],
            is_truncated=line["truncated"],
            is_ungraded=is_ungraded(line),
            vote=read_vote(
                text, thought_opened, reading, kind=prompt.kind, truth_is_number=truth_is_number
            ),
            length_difference=length_difference(text, thought_opened, str(prompt.truth), part),
        )


async def summarize(
    pool: RewardPool,
    log: ResponseLog,
    prompt_set: PromptSet,
    seed: int,
    part: Part = "summary",
    reading: Reading = "strict",
) -> Summary:
    """Summarize a benchmark whose responses are all in the log.

    Args:
        pool: the workers that compare answers.
        log: the responses in the run's folder.
        prompt_set: the benchmark's prompts.
        seed: the seed of the resampling.
        part: the part of a response that a judge compares.
        reading: `rewards.reading`, the place where answers are read.
    """
    prompts = prompt_set.prompts
    lines_by_prompt = log.read(map(prompt_set.key, prompts), prompt_set.num_samples)
    groups = [
        [LoggedResponse.from_line(line, prompt, part, reading) for line in lines]
        for prompt, lines in zip(prompts, lines_by_prompt, strict=True)
    ]
    responses = [response for group in groups for response in group]

    def mean(measure: Callable[[Sequence[LoggedResponse]], float]) -> Estimate:
        return estimate([measure(group) for group in groups], seed)

    pass_curve: dict[int, Estimate] = {}
    vote_curve: dict[int, Estimate] = {}
    if prompt_set.is_pairwise:
        outcomes = [[(s.reward, s.length_difference) for s in group] for group in groups]
        metrics = win_rates(outcomes, seed)
    else:
        sizes = powers_up_to(prompt_set.num_samples)
        pass_curve = {k: mean(partial(_question_pass_at_k, k=k)) for k in sizes}
        vote_curve = await _cons_at_k_curve(pool, prompts, groups, sizes, seed)
        metrics = {"pass@1": mean(lambda group: fmean(s.reward for s in group))}
        metrics |= {f"pass@{k}": value for k, value in pass_curve.items() if k > 1}
        # cons@1 is pass@1: the majority of one answer is that answer.
        metrics |= {f"cons@{k}": value for k, value in vote_curve.items() if k > 1}
    lengths = [[s.length for s in group if s.length is not None] for group in groups]
    if all(lengths):
        metrics["length"] = estimate([fmean(group_lengths) for group_lengths in lengths], seed)
    metrics["truncated"] = mean(lambda group: fmean(s.is_truncated for s in group))
    counts = {
        "questions": len(groups),
        "samples": len(responses),
        "right": sum(s.reward == 1.0 for s in responses),
        "truncated": sum(s.is_truncated for s in responses),
        "ungraded": sum(s.is_ungraded for s in responses),
        "without_length": sum(s.length is None for s in responses),
    }
    if vote_curve:
        counts["without_answer"] = sum(s.vote is None for s in responses)
    return Summary(
        prompt_set.title,
        prompt_set.num_samples,
        metrics=metrics,
        counts=counts,
        pass_at_k=pass_curve,
        cons_at_k=vote_curve,
    )


def _question_pass_at_k(group: Sequence[LoggedResponse], k: int) -> float:
    """Return pass@k of one question; a response with partial credit has not passed."""
    return pass_at_k(len(group), sum(s.reward == 1.0 for s in group), k)


async def _cons_at_k_curve(
    pool: RewardPool,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[LoggedResponse]],
    sizes: Sequence[int],
    seed: int,
) -> dict[int, Estimate]:
    """Return k → cons@k; empty if some responses have no answer that can be compared.

    Args:
        pool: compares answers.
        prompts: the questions.
        groups: the graded responses to each question.
        sizes: the values of k.
        seed: of the subsets, and of the intervals."""
    if not all(can_vote(prompt.kind) for prompt in prompts):
        return {}
    rewards = [[response.reward for response in group] for group in groups]
    answer_groups = await asyncio.gather(
        *(
            group_answers(pool, prompt.kind, [response.vote for response in group], scores)
            for prompt, group, scores in zip(prompts, groups, rewards, strict=True)
        )
    )
    curve = {}
    for size in sizes:
        index_sets = subsets(len(groups[0]), size, seed)
        scores = [
            fmean(voted_reward([answers[i] for i in s], [scored[i] for i in s]) for s in index_sets)
            for answers, scored in zip(answer_groups, rewards, strict=True)
        ]
        curve[size] = estimate(scores, seed)
    return curve


NUM_COLUMNS = 3
PASS_COLOR, VOTE_COLOR = "#2b66d9", "#c2760c"


def write_figure(path: Path, summaries: Sequence[Summary]) -> Path:
    """Write a PNG with a panel per benchmark: points are estimates, bands their 95% intervals."""
    columns = min(NUM_COLUMNS, len(summaries))
    rows = -(-len(summaries) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, summary in zip(grid.flat, summaries, strict=False):
        _panel(axes, summary)
    for axes in list(grid.flat)[len(summaries) :]:
        axes.set_visible(False)
    with atomic_writer(path) as file:
        figure.savefig(file, format="png", dpi=130)
    return path


def _panel(axes: Axes, summary: Summary) -> None:
    axes.set_title(summary.title, fontsize=10)
    if summary.pass_at_k:
        _curve(axes, "pass@k", summary.pass_at_k, PASS_COLOR)
        if len(summary.cons_at_k) > 1:
            _curve(axes, "cons@k", summary.cons_at_k, VOTE_COLOR)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(summary.pass_at_k), [str(k) for k in summary.pass_at_k])
        axes.minorticks_off()
        axes.set_xlabel("k, samples per question")
    else:
        _curve(axes, "win rate", {1: summary.metrics["win_rate"]}, PASS_COLOR)
        _curve(axes, "at equal length", {2: summary.metrics["lc_win_rate"]}, VOTE_COLOR)
        axes.set_xlim(0, 3)
        axes.set_xticks([])
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


def _curve(axes: Axes, label: str, curve: Mapping[int, Estimate], color: str) -> None:
    sizes = list(curve)
    values = [curve[k].value for k in sizes]
    low = np.array([curve[k].low for k in sizes], np.float64)  # None becomes NaN
    high = np.array([curve[k].high for k in sizes], np.float64)
    if len(sizes) > 1:
        axes.fill_between(sizes, low, high, color=color, alpha=0.15, linewidth=0)
    else:
        axes.vlines(sizes, low, high, color=color, alpha=0.5)
    axes.plot(sizes, values, color=color, marker="o", markersize=4, label=label)


LOG_WIDTH = 140
NUM_EXAMPLES = 2
MAX_CHARACTERS = 4_000

WIN_RATES = {"win_rate": "wins: ", "lc_win_rate": "at equal length: "}
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


def write_report(
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
        title=printable(title),
        settings=settings,
        summaries=summaries,
        worded=format_estimate,
        image=base64.b64encode(figure.read_bytes()).decode(),
        num_examples=NUM_EXAMPLES,
        examples=_examples(questions, samples),
    )
    return atomic_write(path, html)


def _examples(
    questions: Mapping[tuple[str, str], Mapping[str, Any]], samples: Iterable[SampleLine]
) -> list[dict[str, Any]]:
    """Return what the page shows of the first samples of each verdict in each benchmark, graded
    samples first. A sample whose grader failed counts only if no later line has its grade."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    ungraded: dict[tuple[str, str, int], tuple[list[dict[str, Any]], dict[str, Any]]] = {}
    for sample in samples:
        group = groups.setdefault((sample["benchmark"], _verdict(sample)), [])
        question = questions.get((sample["benchmark"], sample["id"]))
        key = (sample["benchmark"], sample["id"], sample["index"])
        ungraded.pop(key, None)
        if question is None:
            continue
        if is_ungraded(sample):
            ungraded[key] = group, _example(question, sample)
        elif len(group) < NUM_EXAMPLES:
            group.append(_example(question, sample))
    for group, example in ungraded.values():
        if len(group) < NUM_EXAMPLES:
            group.append(example)
    return [example for _, group in sorted(groups.items()) for example in group]


def _example(question: Mapping[str, Any], sample: SampleLine) -> dict[str, Any]:
    """Return what the page shows of one sample; its text is shortened."""
    source = f"{sample['benchmark']} · {sample['id']} · sample {sample['index']}"
    details = [source, f"reward {sample['reward']:.3g}"]
    if sample["length"] is not None:
        details.append(f"{sample['length']:,} tokens")
    response = printable(shorten_middle(sample["response"], MAX_CHARACTERS), keep_newlines=True)
    return {
        "question": printable(question["question"][:MAX_CHARACTERS], keep_newlines=True),
        "verdict": _verdict(sample),
        "is_correct": sample["reward"] == 1.0,
        "details": details,
        "response": response or "(empty)",
        "turns": conversation(sample),
        "truth": sample["truth"],
        "reason": sample["reason"],
    }


def _verdict(sample: SampleLine) -> str:
    if sample["truncated"]:
        return "truncated"
    return "right" if sample["reward"] == 1.0 else "wrong"
