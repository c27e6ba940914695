"""What people are shown of a reward model's run."""

import re

from megatron_r1.reporting.evaluations import merge_evaluations
from megatron_r1.reporting.live_frame import LiveState
from megatron_r1.reporting.outcome import outcome_sentence
from megatron_r1.reporting.run_report import write_run_report

METRICS = [{"step": s, "loss": 0.7 / s, "accuracy": 1 - 0.5 / s} for s in range(1, 9)]
EVALUATIONS = [
    {"step": 0, "eval/accuracy": 0.5, "interval/accuracy/low": 0.4, "interval/accuracy/high": 0.6},
    {"step": 8, "eval/accuracy": 0.75, "interval/accuracy/low": 0.7, "interval/accuracy/high": 0.8},
]


def test_the_report_says_how_held_out_rows_were_judged(tmp_path):
    sentence = outcome_sentence(METRICS, merge_evaluations(EVALUATIONS))
    figures = re.findall(r"[\d.]+%|\d+ |rose", sentence)
    assert figures[:4] == ["8 ", "rose", "50.0%", "75.0%"]
    for name, lines in (("metrics", METRICS), ("evaluations", EVALUATIONS)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(str, lines)).replace("'", '"') + "\n")
    page = write_run_report(tmp_path).read_text()
    assert "40–60% → 70–80%" in page
    assert "pass@1" not in page.split("<details")[0]


def test_the_live_view_shows_accuracy_and_loss():
    history = {key: [line[key] for line in METRICS] for key in ("loss", "accuracy")}
    assert LiveState("t", 8, history=history).charts == ("accuracy", "loss")
