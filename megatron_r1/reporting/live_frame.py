"""One frame of the live view: the state of a run as lines of text of a given size."""

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.text import Text

from megatron_r1.reporting.formatting import format_clock, format_percent, make_printable
from megatron_r1.reporting.metric_table import KNOWN_METRICS, TIMED_PHASES
from megatron_r1.reporting.record_values import finite_metric, is_correct, prompt_question
from megatron_r1.reporting.text_bars import bar_columns, bar_shares

PHASE_STYLES = {
    "rollout": "blue",
    "reward": "green",
    "train": "yellow",
    "push": "magenta",
    "other": "bright_black",
}
SHOWN_METRICS = (
    "reward/mean",
    "kl",
    "entropy",
    "logprob_diff/mean",
    "clip_fraction",
    "grad_norm",
    "tokens_per_second",
    "loss",
    "learning_rate",
    "format/mean",
    "language/mean",
    "groups/zero_variance",
    "truncated",
    "staleness",
    "routing/agreement",
    "rewards/busy",
    "rewards/timeouts",
    "speculative/acceptance",
)
RL_CHARTS = ("accuracy", "response_length/mean")
SFT_CHARTS = ("loss", "grad_norm")
REWARD_MODEL_CHARTS = ("accuracy", "loss")
MAX_HEIGHT = 46
MAX_WIDTH = 140


@dataclass
class LiveState:
    """The contents of the view. Times are seconds on the monotonic clock."""

    title: str
    total_steps: int
    facts: tuple[str, ...] = ()
    started_at: float = 0.0
    phase: str = "starting"
    detail: str = ""
    phase_started_at: float = 0.0
    step: int = 0
    seconds_per_step: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    history: dict[str, list[float | None]] = field(default_factory=dict)
    evaluations: dict[int, dict[str, Any]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    outcome_text: str = ""
    ended_at: float = 0.0

    @property
    def charts(self) -> tuple[str, str]:
        """The two curves of the run's kind: RL, supervised, or a reward model."""
        if "loss" not in self.history or RL_CHARTS[1] in self.history:
            return RL_CHARTS
        return REWARD_MODEL_CHARTS if "accuracy" in self.history else SFT_CHARTS

    def seconds_left(self) -> float | None:
        """Seconds to the last step at the present pace; None before the first."""
        if self.seconds_per_step is None:
            return None
        return max(0, self.total_steps - self.step) * self.seconds_per_step


def render_frame(state: LiveState, console: Console, timestamp: float) -> Group:
    """Return the whole view, as wide as the terminal and at most one line less high.

    The height does not change while the run goes on, so every refresh covers the one before.

    Args:
        state: what is shown.
        console: the terminal, whose size counts.
        timestamp: the time, on the clock of `LiveState`."""
    width = min(console.size.width - 1, MAX_WIDTH)
    height = min(console.size.height - 1, MAX_HEIGHT)
    is_roomy = height >= 32
    lines = [
        _title_line(state),
        _progress_line(state, width, timestamp),
        _phase_line(state, timestamp),
        Text(),
    ]
    lines += _curve_lines(state, width, rows=6 if is_roomy else 2)
    lines += [Text(), *_metric_lines(state, width), Text(), *_time_split(state, width)]
    lines += [Text()] if is_roomy else []
    lines += [_heldout_line(state, width), Text()]
    lines += _sample_lines(
        state, console, width, height - len(lines), max_samples=4 if is_roomy else 2
    )
    if not state.outcome_text:
        lines += [Text()] * (height - len(lines))
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return Group(*lines[:height])


def _title_line(state: LiveState) -> Text:
    line = Text(make_printable(state.title), style="bold")
    for fact in state.facts:
        line.append(f" · {make_printable(fact)}", style="not bold bright_black")
    return line


def _progress_line(state: LiveState, width: int, timestamp: float) -> Text:
    elapsed_seconds = (state.ended_at or timestamp) - state.started_at
    seconds_left = state.seconds_left()
    head = f"step {state.step}/{state.total_steps}  "
    tail = f"  {format_clock(elapsed_seconds)} elapsed"
    if seconds_left is not None and not state.outcome_text:
        tail += f"  {format_clock(seconds_left)} left"
    room = max(4, width - len(head) - len(tail))
    filled_cells = min(room, room * state.step // max(1, state.total_steps))
    return Text.assemble(
        (head, "bold"),
        ("━" * filled_cells, "cyan"),
        ("─" * (room - filled_cells), "bright_black"),
        tail,
    )


def _phase_line(state: LiveState, timestamp: float) -> Text:
    if state.outcome_text:
        is_finished = state.outcome_text.startswith("finished")
        return Text(
            ("✓ " if is_finished else "■ ") + state.outcome_text,
            style="green" if is_finished else "yellow",
        )
    style = PHASE_STYLES.get(state.phase, "cyan")
    line = Text.assemble(("● ", style), make_printable(state.phase))
    if state.detail:
        line.append(f"  {make_printable(state.detail)}", style="bright_black")
    waiting_seconds = timestamp - state.phase_started_at
    if waiting_seconds >= 3:
        line.append(f"  {format_clock(waiting_seconds)}", style="bright_black")
    return line


def _curve_lines(state: LiveState, width: int, rows: int) -> list[Text]:
    gap = 4
    chart_width = (width - gap) // 2
    lines = [Text() for _ in range(rows + 1)]
    for position, key in enumerate(state.charts):
        metric, style = KNOWN_METRICS[key], "cyan" if key in ("accuracy", "loss") else "yellow"
        values = state.history.get(key, [])
        numbers = [value for value in values if value is not None]
        maximum = max(numbers, default=0.0)
        top = 1.0 if metric.unit == "%" else maximum if maximum > 0 else 1.0
        latest_value = metric.format(finite_metric(state.metrics, key))
        label = f"{metric.label} "
        scale = f"top {'100%' if metric.unit == '%' else metric.format(top)}" if numbers else ""
        space = " " * max(1, chart_width - len(label) - len(latest_value) - len(scale))
        lines[0].append_text(
            Text.assemble(label, (latest_value, f"bold {style}"), (space + scale, "bright_black"))
        )
        for line, row in zip(lines[1:], bar_columns(values, chart_width, rows, top), strict=True):
            line.append(row.ljust(chart_width), style=style)
        if position == 0:
            for line in lines:
                line.append(" " * gap)
    return lines


def _metric_lines(state: LiveState, width: int) -> list[Text]:
    labels, values = Text(style="bright_black"), Text(style="bold")
    room = width
    for metric in map(KNOWN_METRICS.__getitem__, SHOWN_METRICS):
        is_shown = metric.key not in state.charts and metric.key in state.metrics
        cell_width = max(len(metric.label), 7) + 3
        if not is_shown or cell_width > room:
            continue
        room -= cell_width
        value = metric.format(finite_metric(state.metrics, metric.key))
        labels.append(metric.label.ljust(cell_width))
        values.append(value.ljust(cell_width))
    return [labels, values]


def _time_split(state: LiveState, width: int) -> list[Text]:
    seconds = {
        phase: max(0.0, finite_metric(state.metrics, f"time/{phase}") or 0.0)
        for phase in TIMED_PHASES
    }
    step = finite_metric(state.metrics, "time/step")
    if step is not None:
        seconds["other"] = max(0.0, step - sum(seconds.values()))
    bar, legend = Text(), Text()
    total = sum(seconds.values())
    cells = bar_shares(list(seconds.values()), width)
    for (phase, value), count in zip(seconds.items(), cells, strict=True):
        if value <= 0 or value < 0.005 * total:
            continue
        bar.append("▆" * count, style=PHASE_STYLES[phase])
        if phase != "other" or width >= 100:
            legend.append("■ ", style=PHASE_STYLES[phase])
            legend.append(phase)
            legend.append(f" {value:.2f} s  ", style="bright_black")
    if step:
        legend.append(f"{step:.2f} s a step", style="bright_black")
    return [bar, legend]


def _heldout_line(state: LiveState, width: int) -> Text:
    line = Text("held-out  ", style="bold")
    if not state.evaluations:
        return line.append("not evaluated yet", style="not bold bright_black")
    points = []
    for step, metrics in sorted(state.evaluations.items()):
        pass_rate = finite_metric(metrics, "eval/pass@1")
        pass_rate = finite_metric(metrics, "eval/accuracy") if pass_rate is None else pass_rate
        if pass_rate is not None:
            points.append((f"step {step} ", format_percent(pass_rate)))
    tail = _describe_majority(state.evaluations[max(state.evaluations)])
    room = width - len(line) - len(tail)
    sizes = [len(step) + len(value) + 2 for step, value in points]
    kept_points = list(range(len(points)))
    if points and sum(sizes) > room:  # the first evaluation, and the latest that fit next to it
        room -= sizes[0] + 2
        kept_points = [0, *(i for i in kept_points[1:] if sum(sizes[i:]) <= room)]
    for previous, i in zip([-1, *kept_points], kept_points, strict=False):
        line.append("… " if i - previous > 1 else "", style="not bold bright_black")
        line.append(points[i][0], style="not bold bright_black")
        line.append(f"{points[i][1]}  ", style="not bold" if i < len(points) - 1 else "green")
    return line.append(tail, style="not bold bright_black")


def _describe_majority(metrics: dict[str, Any]) -> str:
    for key in metrics:
        value = finite_metric(metrics, key)
        votes = key.removeprefix("eval/cons@")
        if votes not in (key, "1") and value is not None:
            return f"majority of {votes} {format_percent(value)}"
    return ""


def _sample_lines(
    state: LiveState, console: Console, width: int, height: int, max_samples: int
) -> list[Text]:
    """Return questions and responses; long ones are cut to the beginning and the last line, which
    has the answer."""
    samples = state.samples[:max_samples]
    if not samples or height < 2:
        return []
    lines: list[Text] = []
    for i, sample in enumerate(samples):
        room = (height - len(lines)) // (len(samples) - i)
        mark, style = ("✓ ", "green") if is_correct(sample) else ("✗ ", "red")
        length = finite_metric(sample, "length")
        question = Text.assemble(
            (mark, style),
            (make_printable(prompt_question(sample.get("question", "")))[:width], "bold"),
            (f"  {length:.0f} tokens" if length else "", "bright_black"),
        )
        lines.append(question)
        wrapped = list(_response_text(sample, style).wrap(console, width - 2))
        if len(wrapped) > room - 1:
            wrapped = wrapped[: room - 2] + [Text("… ", "bright_black") + wrapped[-1]]
        lines += [Text("  ") + line for line in wrapped[: max(0, room - 1)]]
        if i < len(samples) - 1 and len(wrapped) < room - 1:
            lines.append(Text())
    return lines


def _response_text(sample: dict[str, Any], style: str) -> Text:
    response = str(sample.get("response", ""))
    if len(response) > 4000:
        response = response[:3000] + " … " + response[-600:]
    response = make_printable(response.strip()) or "(empty)"
    start = response.rfind("<answer>")
    start = len(response) if start < 0 else start
    return Text.assemble((response[:start], "bright_black"), (response[start:], style))
