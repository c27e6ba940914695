"""Formats numbers, times and samples for the terminal and for reports."""

import math
import numbers
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """The label and form of one key of metrics.jsonl.

    Attributes:
        key: its key in metrics.jsonl.
        label: its name for people.
        meaning: what it says, in a sentence.
        unit: "%" shows a fraction as a percentage, "s" seconds, "" a plain number.
        has_log_scale: whether plots have a logarithmic axis."""

    key: str
    label: str
    meaning: str
    unit: str = ""
    has_log_scale: bool = False

    def format(self, value: float | None) -> str:
        """Return the value in the metric's unit, or a dash."""
        if value is None:
            return "–"
        if self.unit == "%":
            return format_percent(value)
        return format_number(value) + (" s" if self.unit == "s" else "")


KNOWN_METRICS = {
    metric.key: metric
    for metric in [
        Metric("accuracy", "accuracy", "right answers among the step's samples", "%"),
        Metric("response_length/mean", "response length", "tokens per response, mean"),
        Metric("reward/mean", "reward", "mean over the step's samples"),
        Metric("kl", "KL", "to the reference policy, nats per token"),
        Metric("entropy", "entropy", "of the policy, nats per token"),
        Metric("logprob_diff/mean", "logprob diff", "engine against trainer, mean |Δ|", "", True),
        Metric("logprob_diff/max", "logprob diff, max", "largest |Δ| of the step", "", True),
        Metric(
            "logprob_diff/without_replay",
            "logprob diff, no replay",
            "if the trainer routed for itself, mean |Δ|",
            "",
            True,
        ),
        Metric("routing/agreement", "same experts", "engine's choices the trainer shares", "%"),
        Metric("clip_fraction", "clipped", "tokens whose ratio was clipped", "%"),
        Metric("grad_norm", "grad norm", "before clipping"),
        Metric("loss", "loss", "as the optimizer sees it"),
        Metric("learning_rate", "learning rate", "mean over the step's updates"),
        Metric("tokens_per_second", "tokens/s", "over the whole step"),
        Metric("format/mean", "format", "responses in the asked-for form", "%"),
        Metric("groups/zero_variance", "equal groups", "groups with one reward for all", "%"),
        Metric("truncated", "truncated", "responses cut at the length limit", "%"),
        Metric("staleness", "staleness", "policy versions between sampling and training"),
        Metric("speculative/acceptance", "drafts accepted", "share of the drafted tokens", "%"),
        Metric("language/mean", "language", "words of the thought in the target language", "%"),
        Metric("rewards/busy", "graders busy", "share of the time reward workers graded", "%"),
        Metric("rewards/timeouts", "grader timeouts", "responses whose grader was killed"),
    ]
}
TIMED_PHASES = ("rollout", "reward", "train", "push")


def shown_metrics(metrics: Mapping[str, Any], weights: Collection[str] | None) -> dict[str, Any]:
    """Return a line of metrics or of an evaluation as it is shown: without the format reward where
    that has no weight, as every response is graded for format.

    Args:
        metrics: a line of metrics.jsonl or evaluations.jsonl.
        weights: `rewards.weights`, or None.
    """
    hidden = () if weights is None or "format" in weights else ("format/mean", "eval/format")
    return {key: value for key, value in metrics.items() if key not in hidden}


def finite_metric(metrics: Mapping[str, Any], key: str) -> float | None:
    """Return the metric as a float, or None if it is missing, null, text, NaN or infinite."""
    value = metrics.get(key)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    value = float(value)
    return value if math.isfinite(value) else None


def format_number(value: float) -> str:
    """Format with about three significant digits: 0.451, 61.3, 3,412, 3.2e-06."""
    size = abs(value)
    if value == 0:
        return "0"
    if size < 0.001 or size >= 1e7:
        return f"{value:.1e}"
    if size >= 99.95:
        return f"{value:,.0f}"
    # Decimals chosen after rounding, so that 9.996 reads 10.0 and not 10.00.
    return f"{value:.1f}" if size >= 9.995 else f"{value:.2f}" if size >= 0.9995 else f"{value:.3f}"


def format_percent(fraction: float) -> str:
    """Format a fraction: 0.947 as 94.7%."""
    return f"{100 * fraction:.1f}%"


def format_count(count: int, noun: str) -> str:
    """Format a count: 1 file, 1,300 files, 2 batches."""
    plural = "es" if noun.endswith("ch") else "s"
    return f"{count:,} {noun}{'' if count == 1 else plural}"


def format_clock(seconds: float) -> str:
    """Format a time: 0:07, 12:34, 1:02:03."""
    total_seconds = max(0, int(seconds))
    hours = total_seconds // 3600
    minutes = total_seconds // 60 % 60
    last_seconds = total_seconds % 60
    return f"{hours}:{minutes:02}:{last_seconds:02}" if hours else f"{minutes}:{last_seconds:02}"


def format_duration(seconds: float) -> str:
    """Format a duration: 7.2 s, 6 min 12 s, 3 h 20 min, 2 d 4 h."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    total_seconds = round(seconds)
    if total_seconds < 3600:
        return f"{total_seconds // 60} min {total_seconds % 60} s"
    if total_seconds < 86400:
        return f"{total_seconds // 3600} h {total_seconds // 60 % 60} min"
    return f"{total_seconds // 86400} d {total_seconds // 3600 % 24} h"


def format_seconds(seconds: float) -> str:
    """Format a duration in one unit: 12 s, 3 min, 2.5 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7_200 else f"{seconds / 3600:.1f} h"


def make_printable(text: Any, keep_newlines: bool = False) -> str:
    """Replace control and bidirectional characters, so that text is safe for terminals and logs.

    A model under training may write any character, escape sequences included.
    """
    kept_chars = "\n" if keep_newlines else ""
    text = str(text).replace("\t", "    ")
    return "".join(
        char
        if char in kept_chars or unicodedata.category(char)[0] != "C"
        else ("↵" if char == "\n" else "�")
        for char in text
    )


def shorten_middle(text: str, max_characters: int) -> str:
    """Replace the middle of a longer text by the number of characters left out."""
    if len(text) <= max_characters:
        return text
    half = max_characters // 2
    left_out = f"\n[… {len(text) - max_characters:,} characters left out …]\n"
    return text[:half] + left_out + text[-half:]


def is_correct(sample: Mapping[str, Any]) -> bool:
    """Return whether a sample is right, by its accuracy reward, or by its reward without one."""
    rewards = sample.get("rewards")
    parts = rewards if isinstance(rewards, Mapping) else {}
    accuracy = finite_metric(parts, "accuracy")
    return ((finite_metric(sample, "reward") or 0.0) if accuracy is None else accuracy) >= 0.5


def prompt_question(text: Any) -> str:
    """Return the last line that is not blank: the question of a prompt in the R1-Zero template."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    question_lines = [line for line in lines if not line.startswith("Assistant:")] or lines
    return question_lines[-1].removeprefix("User: ") if question_lines else ""
