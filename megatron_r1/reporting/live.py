"""The live view of a run: a picture of fixed size on a terminal, one line per step in a log."""

import contextlib
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, Self, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from megatron_r1.reporting.formatting import (
    format_clock,
    format_duration,
    format_number,
    make_printable,
)
from megatron_r1.reporting.live_frame import LiveState, render_frame
from megatron_r1.reporting.metric_table import KNOWN_METRICS
from megatron_r1.reporting.record_values import finite_metric, is_correct

REFRESHES_PER_SECOND = 2
# Samples stay this long on the screen, however fast the steps: long enough to read one.
SAMPLE_HOLD_SECONDS = 5.0
PLAIN_METRICS = (
    "accuracy",
    "reward/mean",
    "response_length/mean",
    "loss",
    "kl",
    "entropy",
    "logprob_diff/mean",
    "grad_norm",
    "tokens_per_second",
)


class LiveView:
    """Shows a run while it trains. Odd metrics are shown as "–": no input can stop the run.

        with LiveView("r1-zero", 120, facts=["1.4M parameters"]) as view:
            view.show_phase("rollout", "256 samples")
            view.show_step(metrics, samples)

    Args:
        title: the run's name, for the header.
        total_steps: the steps of the whole run.
        stream: the output; default: sys.stdout. The picture is drawn on UTF-8 terminals only;
            anything else (a file, CI, a Slurm log) gets plain lines without control characters.
        facts: short texts for the header: model, parameters, task.
        history: metrics lines of the steps before this process, on resume."""

    def __init__(
        self,
        title: str,
        total_steps: int,
        stream: TextIO | None = None,
        *,
        facts: Sequence[str] = (),
        history: Iterable[Mapping[str, Any]] = (),
    ):
        self._stream = stream or sys.stdout
        start = time.monotonic()
        self._state = LiveState(
            title, total_steps, tuple(facts), started_at=start, phase_started_at=start
        )
        self._seen_phases: set[str] = set()
        self._step_times: deque[float] = deque(maxlen=20)
        self._step_ended = start
        self._samples_until = 0.0
        for metrics in history:
            self._remember_metrics(metrics)
        self._console: Console | None = None
        self._live: Live | None = None
        if _is_terminal(self._stream):
            self._console = console = Console(file=self._stream, highlight=False)
            self._live = Live(
                get_renderable=lambda: self.draw(console),
                console=console,
                refresh_per_second=REFRESHES_PER_SECOND,
                vertical_overflow="crop",
            )
            self._live.start()
        else:
            self._print_line(" · ".join([title, *facts]) + f" · {total_steps} steps")

    def show_phase(self, name: str, detail: str = "") -> None:
        """Show what the run is doing. A log gets a line the first time each phase is entered."""
        state = self._state
        if name != state.phase:
            state.phase_started_at = time.monotonic()
        state.phase, state.detail = name, detail
        if self._live is None and name not in self._seen_phases:
            self._seen_phases.add(name)
            self._print_line(f"{name}: {detail}" if detail else name)

    @property
    def current_phase(self) -> tuple[str, str]:
        """The current phase and its detail."""
        return self._state.phase, self._state.detail

    def show_step(
        self, metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Show a finished step: its metrics line and some of its samples (as in samples.jsonl)."""
        timestamp = time.monotonic()
        # Prefer the step's own time: the time between two calls includes start-up and evaluations.
        self._step_times.append(finite_metric(metrics, "time/step") or timestamp - self._step_ended)
        self._step_ended = self._state.phase_started_at = timestamp
        self._state.seconds_per_step = fmean(self._step_times)
        self._remember_metrics(metrics)
        if samples and timestamp >= self._samples_until:
            self._state.samples = _choose_samples(samples)
            self._samples_until = timestamp + SAMPLE_HOLD_SECONDS
        # A log of a long run gets about fifty lines of steps.
        state = self._state
        interval = max(1, state.total_steps // 50)
        if self._live is None and (
            state.step % interval == 0 or state.step in (1, state.total_steps)
        ):
            self._print_line(self._plain_step(metrics))

    def rewind(
        self, history: Iterable[Mapping[str, Any]], evaluations: Iterable[Mapping[str, Any]]
    ) -> None:
        """Replace the steps shown so far: the run went back to an older checkpoint."""
        state = self._state
        state.step, state.metrics, state.evaluations = 0, {}, {}
        state.history.clear()
        for metrics in history:
            self._remember_metrics(metrics)
        for metrics in evaluations:
            self._add_evaluation(metrics)

    def show_evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Show a held-out evaluation: "eval/…" keys, and "step" unless it is the last step's."""
        step = self._add_evaluation(metrics)
        if self._live is None:
            parts = [
                f"{key.removeprefix('eval/')} {_evaluation_text(key, metrics)}"
                for key in metrics
                if str(key).startswith("eval/")
            ]
            self._print_line(f"held-out at step {step}: " + ", ".join(parts))

    def show_message(self, text: str) -> None:
        """Print a permanent line: above the picture, or into the log."""
        if self._live is None or self._console is None:
            self._print_line(text)
            return
        with contextlib.suppress(OSError):
            self._console.print(Text(make_printable(text, keep_newlines=True)))

    def close(self, outcome: str = "finished") -> None:
        """End the view and keep its last picture.

        Args:
            outcome: "finished" or why the run ended."""
        state = self._state
        if state.outcome_text:
            return
        state.ended_at = time.monotonic()
        state.outcome_text = f"{outcome} in {format_duration(state.ended_at - state.started_at)}"
        if self._live is None:
            self._print_line(state.outcome_text)
            return
        with contextlib.suppress(OSError):
            self._live.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exit_details: object) -> None:
        if kind is None:
            self.close()
        else:
            word = "interrupted" if kind is KeyboardInterrupt else f"stopped by {kind.__name__}"
            self.close(f"{word} at step {self._state.step},")

    def draw(self, console: Console, timestamp: float | None = None) -> Group:
        """Return the picture for a console of that size.

        Args:
            console: whose width and height the picture has.
            timestamp: on the monotonic clock.
        """
        return render_frame(
            self._state, console, time.monotonic() if timestamp is None else timestamp
        )

    def _remember_metrics(self, metrics: Mapping[str, Any]) -> None:
        state = self._state
        metrics = {str(key): value for key, value in metrics.items()}
        step = finite_metric(metrics, "step")
        state.step = state.step + 1 if step is None else int(step)
        state.metrics = metrics
        # The base model's evaluation is a line of its own: it has no training curve to add to.
        if "time/train" in metrics or "loss" in metrics or "accuracy" in metrics:
            for key in ("accuracy", "response_length/mean", "loss", "grad_norm"):
                if key in metrics:
                    state.history.setdefault(key, []).append(finite_metric(metrics, key))
        if any(key.startswith("eval/") for key in metrics):
            self._add_evaluation(metrics)

    def _add_evaluation(self, metrics: Mapping[str, Any]) -> int:
        step = finite_metric(metrics, "step")
        step = self._state.step if step is None else int(step)
        self._state.evaluations = {**self._state.evaluations, step: dict(metrics)}
        return step

    def _plain_step(self, metrics: Mapping[str, Any]) -> str:
        state = self._state
        parts = [f"step {state.step}/{state.total_steps}"]
        for key in PLAIN_METRICS:
            if key in metrics:
                parts.append(
                    f"{KNOWN_METRICS[key].label} "
                    f"{KNOWN_METRICS[key].format(finite_metric(metrics, key))}"
                )
        if state.seconds_per_step is not None:
            parts.append(f"{format_number(state.seconds_per_step)} s a step")
            parts.append(f"{format_clock(state.seconds_left() or 0.0)} left")
        return "  ".join(parts)

    def _print_line(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')}  {make_printable(text)}\n"
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        # A log that cannot be written (full disk, closed pipe) must not end a training run.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(line.encode(encoding, errors="replace").decode(encoding))
            self._stream.flush()


def _is_terminal(stream: TextIO) -> bool:
    encoding = (getattr(stream, "encoding", None) or "").lower()
    if not stream.isatty() or not encoding.startswith("utf"):
        return False
    return not Console(file=stream).is_dumb_terminal


def _choose_samples(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return up to four samples of different questions: a right one, a wrong one, and others."""
    selection: list[dict[str, Any]] = []
    questions: set[str] = set()
    for verdict in (True, False, None, None):
        for sample in samples:
            question = str(sample.get("question", ""))
            if question not in questions and verdict in (None, is_correct(sample)):
                selection.append(dict(sample))
                questions.add(question)
                break
    return selection


def _evaluation_text(key: str, metrics: Mapping[str, Any]) -> str:
    value = finite_metric(metrics, key)
    if value is None:
        return "–"
    if key == "eval/questions":
        return f"{value:.0f}"
    return f"{100 * value:.1f}%" if "@" in key else format_number(value)
