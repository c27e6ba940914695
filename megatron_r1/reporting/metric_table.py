"""The metrics that the terminal and reports show, with their formats."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_r1.reporting.formatting import format_number, format_percent


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
