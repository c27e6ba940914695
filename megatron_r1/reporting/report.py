"""The report of a run: one self-contained HTML file to read, keep, print or send."""

import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.files import atomic_write
from megatron_r1.reporting.outcome import Evaluation, Score, evaluations
from megatron_r1.reporting.report_plots import small_plots, time_split, two_curves
from megatron_r1.reporting.report_samples import samples_section
from megatron_r1.reporting.report_style import page
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.reporting.wording import duration, finite, number, percent, printable

Metrics = Sequence[Mapping[str, Any]]


def write_report(
    run_folder: RunFolder | str | Path,
    *,
    title: str = "",
    facts: Mapping[str, str] | None = None,
    next_commands: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write `report.html` into the folder from what is in it, and return its path.

    title: the run's name, the folder's by default. facts: what was run, in order, such as
    {"model": "DeepSeek-V3 shape, 3 layers", "parameters": "1.36M", "device": "2 CPU cores"};
    steps, duration and date are added. next_commands: (comment, command) pairs to try next.
    Any run will do: one step, no evaluations, supervised training, or nothing recorded yet.
    """
    folder = run_folder if isinstance(run_folder, RunFolder) else RunFolder(run_folder)
    if not folder.path.is_dir():
        raise ValueError(f"{folder.path} is not a folder; give the folder of a run")
    title = escape(printable(title or folder.path.resolve().name))
    metrics = folder.read_metrics()
    found = evaluations([*metrics, *folder.read_evaluations()])
    sections = [
        f"<h1>{title}</h1>",
        _facts({**(facts or {}), **_measured_facts(folder, metrics)}),
        f'<p class="outcome">{escape(outcome_sentence(metrics, found))}</p>',
        _tiles(metrics, found),
    ]
    if metrics:
        sections += [_curves(metrics, found), samples_section(folder.read_samples)]
    sections += [_settings(folder.read_config()), _next(next_commands)]
    return atomic_write(folder.report_path, page(title, "\n".join(s for s in sections if s)))


def outcome_sentence(metrics: Metrics, found: Sequence[Evaluation]) -> str:
    """What came of the run, in one sentence with numbers."""
    if not metrics and not found:
        return "Nothing to report yet: metrics.jsonl is empty or missing."
    scored = [evaluation for evaluation in found if evaluation.passed]
    steps = f"In {_num_steps(metrics):,} steps" if _num_steps(metrics) != 1 else "In one step"
    if len(scored) > 1:
        return f"{steps}, {_change(scored[0], scored[-1])}."
    if scored:
        last = scored[0]
        text = f"At step {last.step}, held-out pass@1 is {_scored(last.passed)}"
        if last.majority:
            text += f" and the majority vote of {last.num_votes} {_scored(last.majority)}"
        return f"{text}."
    judged = [evaluation.accuracy for evaluation in found if evaluation.accuracy]
    if len(judged) > 1:
        went = _went(judged[0].value, judged[-1].value, percent)
        return f"{steps}, the accuracy of held-out scores {went}."
    for key, name, worded in (
        ("accuracy", "accuracy on the training samples", percent),
        ("loss", "the loss", number),
    ):
        ends = _ends(metrics, key)
        if ends:
            return f"{steps}, {name} {_went(*ends, worded)}; nothing was evaluated held-out."
    return f"{steps}, neither accuracy nor loss was recorded."


def _change(first: Evaluation, last: Evaluation) -> str:
    assert first.passed and last.passed, "called with scored evaluations only"
    passed = _went(first.passed.value, last.passed.value, percent)
    text = f"held-out pass@1 {passed}"
    if first.step > 0:
        text += f" since step {first.step}"
    if first.majority and last.majority:
        voted = _went(first.majority.value, last.majority.value, percent)
        verb = passed.split()[0]
        text += f" and the majority vote of {last.num_votes} {voted.removeprefix(f'{verb} ')}"
    if first.length is not None and last.length is not None:
        text += (
            f", while the mean response {_went(first.length, last.length, number, 'grew')} tokens"
        )
    return text


def _went(before: float, after: float, worded: Any, up: str = "rose") -> str:
    if worded(before) == worded(after):
        return f"stayed at {worded(after)}"
    down = "shrank" if up == "grew" else "fell"
    return f"{up if after > before else down} from {worded(before)} to {worded(after)}"


def _scored(score: Score | None) -> str:
    if score is None:
        return "–"
    return percent(score.value) + (
        f" (95% interval {_interval(score)})" if _interval(score) else ""
    )


def _interval(score: Score | None) -> str:
    if score is None or score.low is None or score.high is None:
        return ""
    return f"{100 * score.low:.0f}–{100 * score.high:.0f}%"


def _ends(metrics: Metrics, key: str) -> tuple[float, float] | None:
    """The means of the first and of the last tenth of a curve: single steps are noisy."""
    values = [value for line in metrics if (value := finite(line, key)) is not None]
    if not values:
        return None
    tenth = max(1, len(values) // 10)
    return float(np.mean(values[:tenth])), float(np.mean(values[-tenth:]))


def _num_steps(metrics: Metrics) -> int:
    return int(max(finite(line, "step") or 0.0 for line in metrics))


def _measured_facts(folder: RunFolder, metrics: Metrics) -> dict[str, str]:
    if not metrics:
        return {}
    facts = {"steps": f"{_num_steps(metrics):,}"}
    seconds = sum(finite(line, "time/step") or 0.0 for line in metrics)
    if seconds:
        facts["time in steps"] = duration(seconds)
    ended = time.localtime(folder.metrics_path.stat().st_mtime)
    facts["ended"] = time.strftime("%Y-%m-%d %H:%M", ended)
    return facts


def _facts(facts: Mapping[str, str]) -> str:
    items = [
        f"<span>{escape(printable(name))} <b>{escape(printable(value))}</b></span>"
        for name, value in facts.items()
    ]
    return f'<p class="facts">{"".join(items)}</p>'


def _tiles(metrics: Metrics, found: Sequence[Evaluation]) -> str:
    tiles = []
    for name, scores in (
        ("held-out pass@1", [e.passed for e in found if e.passed]),
        ("held-out accuracy", [e.accuracy for e in found if e.accuracy]),
        (
            f"majority vote of {max((e.num_votes or 0 for e in found), default=0)}",
            [e.majority for e in found if e.majority],
        ),
    ):
        if scores:
            intervals = [_interval(score) for score in (scores[0], scores[-1])]
            below = f"95%: {' → '.join(dict.fromkeys(intervals))}" if all(intervals) else ""
            tiles.append((name, _arrow([percent(score.value) for score in scores]), below))
    lengths = [e.length for e in found if e.length is not None]
    ends = (lengths[0], lengths[-1]) if lengths else _ends(metrics, "response_length/mean")
    if ends:
        where = "held-out, mean" if lengths else "training samples, mean"
        tiles.append(("response length", _arrow([number(end) for end in ends]), f"tokens, {where}"))
    elif losses := _ends(metrics, "loss"):
        tiles.append(("loss", _arrow([number(end) for end in losses]), "first and last tenth"))
    gaps = [gap for line in metrics if (gap := finite(line, "logprob_diff/mean")) is not None]
    if gaps:
        largest = [g for line in metrics if (g := finite(line, "logprob_diff/max")) is not None]
        below = f"largest {number(max(largest))}" if largest else ""
        if own := [
            g for line in metrics if (g := finite(line, "logprob_diff/without_replay")) is not None
        ]:
            below += f"; without routing replay {number(float(np.mean(own)))}"
        tiles.append(("logprob diff to the engine", number(float(np.mean(gaps))), below))
    speeds = [s for line in metrics if (s := finite(line, "tokens_per_second")) is not None]
    if speeds:
        seconds = [s for line in metrics if (s := finite(line, "time/step")) is not None]
        below = f"{number(float(np.median(seconds)))} s a step" if seconds else ""
        tiles.append(("tokens per second", number(float(np.median(speeds))), below))
    items = [
        f'<div class="tile"><span>{escape(name)}</span><strong>{escape(value)}</strong>'
        f"<span>{escape(below)}</span></div>"
        for name, value, below in tiles
    ]
    return f'<div class="tiles">{"".join(items)}</div>' if items else ""


def _arrow(values: Sequence[str]) -> str:
    return values[0] if values[0] == values[-1] else f"{values[0]} → {values[-1]}"


def _curves(metrics: Metrics, found: Sequence[Evaluation]) -> str:
    parts = []
    if curves := two_curves(metrics, found):
        parts.append(
            "<h2>Accuracy and response length</h2><p>Over the steps of the run; points are "
            "held-out evaluations, bars their 95% intervals.</p>" + curves
        )
    if curves := small_plots(metrics) + time_split(metrics):
        parts.append(
            "<h2>Training</h2><p>Every step faint, their moving mean bold; the number is that of "
            "the last step.</p>" + curves
        )
    return "\n".join(parts)


def _settings(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    sections = {name: value for name, value in config.items() if isinstance(value, Mapping)}
    loose = {name: value for name, value in config.items() if name not in sections}
    tables = []
    for name, section in {**({"": loose} if loose else {}), **sections}.items():
        rows = [
            f"<tr><td>{escape(str(key))}</td><td>{escape(_setting(value))}</td></tr>"
            for key, value in section.items()
        ]
        head = f'<tr><th colspan="2">{escape(str(name))}</th></tr>' if name else ""
        tables.append(f"<table>{head}{''.join(rows)}</table>")
    return (
        "<details><summary>Settings</summary>"
        f'<div class="settings">{"".join(tables)}</div></details>'
    )


def _setting(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_setting(item)}" for key, item in value.items()) or "–"
    if isinstance(value, list):
        return ", ".join(_setting(item) for item in value) or "–"
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _next(commands: Sequence[tuple[str, str]]) -> str:
    if not commands:
        return ""
    items = [
        f'<div class="command"><p>{escape(comment)}</p><pre>{escape(command)}</pre></div>'
        for comment, command in commands
    ]
    return f"<h2>Next</h2>{''.join(items)}"
