"""The report: right numbers from complete and incomplete records, in one safe file."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.reporting.change_interval import LEARNED, NOT_SHOWN, WORSE
from megatron_r1.reporting.evaluations import HeldoutEstimate, merge_evaluations
from megatron_r1.reporting.outcome import outcome_sentence
from megatron_r1.reporting.plots import (
    Curve,
    curve_plot,
    downsample_curve,
    smooth_curve,
    stacked_plot,
)
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.reporting.run_report import run_headline, write_run_report

VOID = {"meta", "br", "path", "use", "rect", "link"}


class Balance(HTMLParser):
    """Fails on tags that do not close, ids that are not unique and anything to be loaded."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.words = [], [], []

    def handle_starttag(self, tag, attributes):
        names = dict(attributes)
        assert tag not in {"script", "link", "img", "iframe"}, tag
        assert not any(name.startswith("on") for name in names), names
        for name in ("src", "href", "xlink:href"):
            assert names.get(name, "#").startswith("#"), names
        if "id" in names:
            self.ids.append(names["id"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, tag

    def handle_data(self, text):
        if "style" not in self.open:
            self.words.append(text)


def read_page(path):
    html = path.read_text(encoding="utf-8")
    page = Balance()
    page.feed(html)
    page.close()
    assert page.open == []
    assert len(page.ids) == len(set(page.ids)), "two elements share an id"
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        ElementTree.fromstring(svg)
        assert "#0" not in re.sub(r"#[\w-]+-", "", svg), "a color that is no CSS variable"
    return html, " ".join(" ".join(page.words).split())


def figures(sentence):
    """The numbers of a sentence, and which way it says they moved."""
    return re.findall(r"@?\d+(?:\.\d+)?%?|rose|fell", sentence)


def metrics_line(step, num_steps=30):
    x = step / num_steps
    return {
        "step": step,
        "accuracy": 0.2 + 0.6 * x,
        "reward/mean": 0.3 + 0.6 * x,
        "response_length/mean": 20 + 40 * x,
        "kl": 0.01 * x,
        "entropy": 1 - x / 2,
        "logprob_diff/mean": 2e-6,
        "logprob_diff/max": 3e-5,
        "clip_fraction": 0.0,
        "grad_norm": 1.0,
        "tokens_per_second": 3000.0,
        "time/rollout": 0.4,
        "time/reward": 0.1,
        "time/train": 0.4,
        "time/push": 0.05,
        "time/step": 1.0,
    }


def eval_samples(step, correct_counts):
    """correct_counts: per question, how many of its 4 samples are right."""
    return [
        {
            "step": step,
            "question": f"What is {q} + 1?",
            "truth": q + 1,
            "response": f"<think>step {step}</think><answer>{q + 1 + (i >= num_correct)}</answer>",
            "reward": 1.1 if i < num_correct else 0.1,
            "rewards": {"accuracy": float(i < num_correct), "format": 1.0},
            "reason": "compared",
            "length": 10 + step,
            "split": "eval",
        }
        for q, num_correct in enumerate(correct_counts)
        for i in range(4)
    ]


def full_run(path):
    with RunFolder(path) as folder:
        folder.write_config({"rl": {"group_size": 16, "clip": None}, "seed": 1})
        for step in (0, 15, 30):
            correct_counts = [0, 1, 1, 2] if step == 0 else [4, 4, 3, 3]
            folder.append_samples(eval_samples(step, correct_counts))
            folder.append_evaluation(
                {
                    "step": step,
                    "eval/pass@1": sum(correct_counts) / 16,
                    "eval/cons@4": [0.25, 1.0][step > 0],
                    "eval/response_length": 10.0 + step,
                    "interval/pass@1/low": sum(correct_counts) / 16 - 0.1,
                    "interval/pass@1/high": sum(correct_counts) / 16 + 0.1,
                    "interval/cons@4/low": [0.1, 0.9][step > 0],
                    "interval/cons@4/high": [0.4, 1.0][step > 0],
                }
            )
        for step in range(1, 31):
            folder.append_metrics(metrics_line(step))
    return folder


def test_a_full_run_is_reported_with_its_numbers(tmp_path):
    folder = full_run(tmp_path / "run")
    path = write_run_report(
        folder,
        title="sums <1>",
        facts={"model": "DeepSeek-V3 & small"},
        next_commands=[("Look", "tensorboard --logdir 'a' && echo <b>")],
    )
    html, words = read_page(path)
    assert path.name == "report.html"
    outcome = figures(
        outcome_sentence(folder.read_metrics(), merge_evaluations(folder.read_evaluations()))
    )
    assert outcome[:10] == [
        *("30", "@1", "rose", "25.0%", "87.5%", "4", "25.0%", "100.0%", "10.0", "40.0")
    ]
    shown = ["25.0%", "87.5%", "15–35% → 78–98%", "10–40% → 90–100%", "30.0 s", "group_size"]
    given = ["sums <1>", "DeepSeek-V3 & small", "tensorboard --logdir 'a' && echo <b>"]
    assert [text for text in shown + given if text not in words] == []
    assert words.count("0 of 4") == 1
    assert html.count("<svg") == 2 + 7 + 1


@pytest.mark.more
@pytest.mark.parametrize(
    ("truth", "shown"),
    [
        ("Tom has 3 + 4 = 7 left.\n#### 7", "answer: 7"),
        ("Adding gives $7$, so \\boxed{x = 7}.", "answer: x = 7"),
        (7, "answer: 7"),
    ],
)
def test_of_a_truth_that_is_a_solution_the_answer_is_shown(tmp_path, truth, shown):
    sample = eval_samples(1, [1])[0] | {"truth": truth}
    with RunFolder(tmp_path) as folder:
        folder.append_metrics(metrics_line(1))
        folder.append_samples([sample])
        _, words = read_page(write_run_report(folder))
    assert shown in words
    assert "Adding" not in words and "left" not in words


@pytest.mark.more
@pytest.mark.parametrize("heldout", [0.6, 1.0])
def test_temperatures_that_differ_are_said_beside_the_curves(tmp_path, heldout):
    with RunFolder(tmp_path) as folder:
        sections = {"rollout": {"temperature": 1.0}, "eval": {"temperature": heldout}}
        folder.write_config(sections)
        folder.append_metrics(metrics_line(1))
        folder.append_evaluation({"step": 0, "eval/pass@1": 0.5})
        _, words = read_page(write_run_report(folder))
    assert ("at temperature 1.0 and held-out ones at 0.6" in words) == (heldout == 0.6)


def test_what_the_model_writes_cannot_become_markup(tmp_path):
    attack = "</div><script>alert(1)</script><img src=x onerror=alert(1)>\x1b[31m<answer>&lt;"
    with RunFolder(tmp_path) as folder:
        folder.append_metrics(metrics_line(1))
        folder.append_samples(
            [{"step": 1, "question": attack, "response": attack, "reason": attack, "truth": attack}]
        )
        html, words = read_page(write_run_report(folder, title=attack))
    assert "<script" not in html and "<img" not in html and "\x1b" not in html
    assert "<script>alert(1)</script>" in words


@pytest.mark.parametrize(
    "lines, expected",
    [
        ([], ""),
        ([{"step": 1}], ""),
        ([metrics_line(1)], "22.0%"),
        ([{"step": 1, "loss": None}, {"step": 2, "loss": float("nan")}], "2"),
        (
            [{"step": s, "loss": 4.0 - s / 10, "time/train": 0.1} for s in range(1, 21)],
            "20 fell 3.85 2.05",
        ),
        ([{"step": 9, "eval/pass@1": 0.5}], "9 @1 50.0%"),
    ],
)
def test_any_run_has_a_report(tmp_path, lines, expected):
    folder = RunFolder(tmp_path)
    for line in lines:
        folder.append_metrics(line)
    _, words = read_page(write_run_report(tmp_path))
    sentence = outcome_sentence(lines, merge_evaluations(lines))
    assert figures(sentence) == expected.split() and sentence in words


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with refused("folder", Cause.NOT_FOUND, tmp_path / "nowhere"):
        write_run_report(tmp_path / "nowhere")


def evaluated(step, value, low, high, questions):
    return {
        **{"step": step, "eval/pass@1": value, "eval/questions": questions},
        **{"interval/pass@1/low": low, "interval/pass@1/high": high},
    }


@pytest.mark.parametrize(
    ("first", "last", "questions", "verdict", "interval"),
    [
        # By hand: 0.3 - √(0.05² + 0.12²) = 0.17, 0.3 + √(0.05² + 0.12²) = 0.43.
        ((0.2, 0.08, 0.32), (0.5, 0.45, 0.55), 200, LEARNED, "+17 to +43"),
        ((0.5, 0.45, 0.55), (0.2, 0.08, 0.32), 200, WORSE, "-43 to -17"),
        ((0.5, 0.4, 0.6), (0.55, 0.45, 0.65), 200, NOT_SHOWN, "-9 to +19"),
        ((0.5, 0.4, 0.6), (0.5, 0.4, 0.6), 200, NOT_SHOWN, "-14 to +14"),
        # 0 of 9 and 9 of 9: Clopper and Pearson's ends are 1 - 0.025 ** (1 / 9) = 33.6% away.
        ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 9, LEARNED, "+52 to +100"),
        ((0.0, 0.0, 0.0), (0.2, 0.05, 0.4), 9, NOT_SHOWN, "-17 to +40"),
        ((0.0, 0.0, 0.0), (0.2, 0.05, 0.4), 400, LEARNED, "+5 to +40"),
    ],
)
def test_the_verdict_of_a_run_is_by_the_interval_of_the_change(
    first, last, questions, verdict, interval
):
    lines = [evaluated(0, *first, questions), evaluated(8, *last, questions), {"step": 8}]
    sentence = outcome_sentence(lines, merge_evaluations(lines))
    assert sentence.startswith(f"{verdict}:") and interval in sentence
    has_number = f"{questions} questions" in sentence
    assert has_number == (questions < 100) == ("95% interval 0–0%" in sentence)


def test_the_mean_of_a_reward_of_one_s_own_is_named(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.write_config({"data": {"kind": "rewards:length"}})
        for step, value in (0, -0.4), (9, -0.1):
            folder.append_evaluation(evaluated(step, value, value - 0.1, value + 0.1, 200))
    sentence = run_headline(folder)
    assert sentence.startswith(LEARNED) and "rewards:length" in sentence
    assert HeldoutEstimate(-0.1, -0.24, -0.06).interval == "-24 to -6%"


def test_without_two_evaluations_nothing_is_shown():
    alone = [evaluated(0, 0.2, 0.1, 0.3, 12), {"step": 4}]
    sentence = outcome_sentence(alone, merge_evaluations(alone))
    assert sentence.startswith(NOT_SHOWN) and "12 questions" in sentence and "10–30%" in sentence
    trained = [{"step": step, "accuracy": step / 10} for step in range(1, 9)]
    assert outcome_sentence(trained, []).startswith(NOT_SHOWN)
    fitted = [{"step": step, "loss": 1 / step} for step in range(1, 9)]
    assert NOT_SHOWN not in outcome_sentence(fitted, [])


def test_a_fall_is_not_called_a_rise():
    lines = [
        {"step": 10, "eval/pass@1": 0.5, "eval/response_length": 40.0},
        {"step": 20, "eval/pass@1": 0.4, "eval/response_length": 30.0},
    ]
    sentence = outcome_sentence(lines, merge_evaluations(lines))
    assert figures(sentence) == ["20", "@1", "fell", "50.0%", "40.0%", "10", "40.0", "30.0"]


def test_the_last_evaluation_may_be_before_the_last_step():
    lines = [{"step": 0, "eval/pass@1": 0.2}, {"step": 24, "eval/pass@1": 0.6}, {"step": 31}]
    sentence = outcome_sentence(lines, merge_evaluations(lines))
    assert figures(sentence) == ["24", "31", "@1", "rose", "20.0%", "60.0%"]
    assert figures(outcome_sentence([], merge_evaluations(lines[:1]))) == ["0", "@1", "20.0%"]


def test_the_format_reward_has_a_chart_where_it_has_a_weight(tmp_path):
    for weights in ({"accuracy": 1.0}, {"accuracy": 1.0, "format": 0.1}):
        folder = RunFolder(tmp_path / str(len(weights)))
        folder.path.mkdir()
        folder.write_config({"rewards": {"weights": weights}})
        folder.append_metrics({"step": 1, "accuracy": 0.5, "format/mean": 0.25})
        _, words = read_page(write_run_report(folder))
        assert ("responses in the asked-for form" in words) == ("format" in weights)


def test_training_samples_are_shown_where_nothing_was_evaluated(tmp_path):
    with RunFolder(tmp_path) as folder:
        for step in range(1, 10):
            folder.append_metrics(metrics_line(step))
            folder.append_samples(
                [{"step": step, "question": f"q{step}-{i}", "response": "r"} for i in range(5)]
            )
        _, words = read_page(write_run_report(folder))
    assert sorted(set(re.findall(r"q\d-\d", words))) == [
        f"q{step}-{i}" for step in (1, 5, 9) for i in (0, 1, 2)
    ]


def test_an_episode_is_shown_as_a_conversation(tmp_path):
    call = '<tool_call>{"name": "find", "arguments": {"key": "<b>"}}</tool_call>'
    turns = [
        {"role": "user", "text": "Which?", "tokens": 9, "trained": False, "policy_version": None},
        {"role": "assistant", "text": f"So {call}", "tokens": 1, "trained": True,
         "policy_version": 3},
        {"role": "tool", "text": "", "tokens": 4, "trained": False, "policy_version": None},
    ]  # fmt: skip
    episode = {"question": "Which?", "turns": turns, "status": "max_turns", "reward": 0.0}
    long = {"question": "Long?", "turns": turns * 30, "status": "done", "reward": 1.0}
    with RunFolder(tmp_path) as folder:
        folder.append_metrics(metrics_line(1))
        folder.append_samples([{"step": 1, "response": "r", **line} for line in (episode, long)])
        html, words = read_page(write_run_report(folder))
    places = [words.index(text) for text in ("max_turns", "9 tokens", f"So {call}", "4 tokens")]
    assert places == sorted(places)
    assert "50 turns" in words and html.count("<li") == 3 + 41
    # What was sampled stands out, and so does a call in it.
    assert html.count('<li class="trained">') == 1 + 14 and "<b>&lt;tool_call&gt;" in html


def test_estimates_have_the_intervals_that_their_evaluation_wrote():
    ends = {"interval/pass@1/low": 0.4, "interval/pass@1/high": 0.6}
    lines = [{"step": 5, "loss": 1.0}, {"step": 5, "eval/pass@1": 0.5, "eval/cons@4": 0.7, **ends}]
    (found,) = merge_evaluations(lines)
    assert found.pass_at_1 == HeldoutEstimate(0.5, 0.4, 0.6)
    assert found.majority == HeldoutEstimate(0.7)
    assert found.num_votes == 4 and found.length is None
    assert (
        merge_evaluations([{"step": 5, **ends}, {"step": 6, "eval/cons@1": 0.5}])[0].majority
        is None
    )


def test_smoothing_keeps_constants_and_lines_and_skips_gaps():
    assert np.allclose(smooth_curve(np.full(100, 3.0)), 3.0)
    line = np.arange(100.0)
    assert np.allclose(smooth_curve(line)[10:-10], line[10:-10])
    gaps = np.array([1.0, np.nan, 1.0, np.nan, np.nan, np.nan, np.nan])
    assert np.array_equal(smooth_curve(gaps), [1, 1, 1, 1, np.nan, np.nan, np.nan], equal_nan=True)


def test_a_long_run_is_thinned_and_keeps_its_mean():
    steps, values = downsample_curve(np.arange(30000.0), np.tile([0.0, 2.0], 15000))
    assert len(steps) == len(values) == 300
    assert np.allclose(values, 1.0) and steps.mean() == pytest.approx(29999 / 2)


@pytest.mark.parametrize("values", [[0.5], [np.nan, 0.0], [0.0, 0.0, 0.0], [-1e-9, 1e9]])
def test_plots_of_degenerate_curves_are_valid_svg(values):
    values = np.array(values)
    steps = np.arange(1.0, len(values) + 1)
    curve = Curve("c", steps, values)
    ElementTree.fromstring(curve_plot("a", [curve], as_percent=True, from_zero=True))
    ElementTree.fromstring(curve_plot("b", [curve, curve], has_log_scale=True))
    ElementTree.fromstring(stacked_plot("c", steps, {"rollout": np.abs(values)}))
