"""The live view: a picture of fixed size on terminals, plain lines in logs, never an exception."""

import io
import math
import os
import pty
import re
import sys
import time
import unicodedata
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from megatron_r1.reporting.formatting import (
    format_clock,
    format_duration,
    format_number,
    make_printable,
)
from megatron_r1.reporting.live import LiveView
from megatron_r1.reporting.record_values import prompt_question
from megatron_r1.reporting.text_bars import bar_columns, bar_shares

GIVEN = yaml.safe_load(Path(__file__).with_name("live_view.yaml").read_text(encoding="utf-8"))
RL, ODD = GIVEN["step"], GIVEN["odd"]
LONG = {"question": "数学题：一加一等于几？" * 30, "response": "等于二。" * 5000, "reward": 1.0}
SAMPLES = [*GIVEN["samples"], LONG]


def picture(view, width, height):
    console = Console(file=io.StringIO(), width=width, height=height, force_terminal=False)
    console.print(view.draw(console, time.monotonic() + 10))
    return console.file.getvalue().splitlines()


def view_of(*metrics, samples=(), stream=None):
    view = LiveView("demo", 10, stream or io.StringIO(), facts=["1.4M parameters"])
    for line in metrics:
        view.show_step(line, samples)
    return view


def has_control_characters(text):
    return [c for c in text if c != "\n" and unicodedata.category(c).startswith("C")]


def test_a_log_gets_one_plain_line_per_step_and_one_per_new_phase():
    stream = io.StringIO()
    with LiveView("demo", 3, stream) as view:
        for step in (1, 2, 3):
            for phase in ("rollout", "train"):
                view.show_phase(phase, f"detail {step}")
            view.show_step({**RL, "step": step}, SAMPLES)
        view.show_evaluation({"step": 3, "eval/pass@1": 0.705, "eval/response_length": 64.25})
        view.show_message("saved")
    lines = [re.sub(r"^\d\d:\d\d:\d\d  ", "", line) for line in stream.getvalue().splitlines()]
    assert lines[0] == "demo · 3 steps"
    assert lines[1:3] == ["rollout: detail 1", "train: detail 1"]
    assert [line.split("  ")[0] for line in lines[3:6]] == ["step 1/3", "step 2/3", "step 3/3"]
    for part in ("accuracy 41.2%", "reward 0.451", "response length 61.3", "logprob diff 3.2e-06"):
        assert part in lines[3]
    assert re.findall(r"[\d.]+%|64\.2", lines[6]) == ["70.5%", "64.2"]
    assert lines[7] == "saved" and len(lines) == 9
    assert not has_control_characters(stream.getvalue())


def test_a_log_in_ascii_is_written_without_an_error():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    view_of(RL, stream=stream).close()
    assert b"accuracy 41.2%" in raw.getvalue()


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60), (40, 12), (20, 5)])
@pytest.mark.parametrize("metrics", [(), (RL,), (RL, ODD), ({"step": 1, "loss": 2.5},)])
def test_the_picture_fits_any_terminal_and_does_not_change_its_height(size, metrics):
    width, height = size
    view = view_of(*metrics, samples=SAMPLES)
    view.show_evaluation({"step": 1, "eval/pass@1": 0.5, "eval/cons@16": math.nan})
    lines = picture(view, width, height)
    assert len(lines) == min(height - 1, 46)
    cells = Console(width=width).measure
    assert all(cells(line).maximum <= width for line in lines)
    assert not has_control_characters("\n".join(lines))


def test_the_picture_shows_the_metrics():
    view = view_of({**RL, "step": 2}, RL, samples=SAMPLES)
    view.show_evaluation({"step": 0, "eval/pass@1": 0.182})
    view.show_evaluation({"step": 3, "eval/pass@1": 0.7, "eval/cons@16": 0.75})
    text = "\n".join(picture(view, 80, 24))
    for part in (
        "demo · 1.4M parameters",
        "step 3/10",
        "accuracy 41.2%",
        "response length 61.3",
        "■ train 0.50 s",
        "1.10 s a step",
        "step 0 18.2%",
        "step 3 70.0%",
        "majority of 16 75.0%",
        "✓ What is 2 + 3?",
        "✗ What is [bold]4 + 4[/bold]?",
        "<answer>5</answer>",
    ):
        assert part in text, part
    bar = next(line for line in text.splitlines() if "▆" in line)
    assert len(bar) == 79


def test_a_supervised_run_shows_loss_instead_of_reward():
    steps = [{"step": s, "loss": 3.0 - s, "grad_norm": 1.0, "time/train": 0.1} for s in (1, 2)]
    text = "\n".join(picture(view_of(*steps), 80, 24))
    assert "loss 1.00" in text and "grad norm 1.00" in text
    assert "accuracy" not in text and "reward" not in text


def test_resumed_runs_start_with_their_history():
    history = [{**RL, "step": s} for s in (1, 2, 3)] + [{"step": 3, "eval/pass@1": 0.4}]
    view = LiveView("demo", 10, io.StringIO(), history=history)
    text = "\n".join(picture(view, 80, 24))
    assert "step 3/10" in text and "step 3 40.0%" in text
    charts = [line for line in text.splitlines() if "▇" in line]
    assert charts and charts[0].startswith("▇▇▇ "), "one column per step of the history"


def test_odd_metrics_never_raise():
    for stream in (io.StringIO(), None):
        view = LiveView("demo", 0, stream or io.StringIO())
        view.show_step({})
        view.show_step(ODD, [{}, {"rewards": None, "response": None, "reward": "x"}])
        view.show_evaluation({"eval/pass@1": None, "step": float("nan")})
        picture(view, 80, 24)
        view.close()
        view.close()


def test_a_closed_log_does_not_stop_the_run():
    stream = io.StringIO()
    view = LiveView("demo", 3, stream)
    stream.close()
    view.show_step(RL)
    view.close()


def test_an_exception_is_passed_on_and_named_in_the_last_line():
    stream = io.StringIO()
    with pytest.raises(RuntimeError), LiveView("demo", 3, stream) as view:  # noqa: PT012
        view.show_step(RL)
        raise RuntimeError("engine died")
    last = stream.getvalue().splitlines()[-1]
    assert "RuntimeError" in last and "3" in last


def test_a_terminal_gets_the_picture_and_its_cursor_back(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    master, slave = pty.openpty()
    with os.fdopen(slave, "w", encoding="utf-8") as stream:
        with LiveView("demo", 3, stream) as view:
            view.show_message("[not markup] stays")
            view.show_step(RL, SAMPLES)
        out = b""
        while not out.endswith(b"\x1b[?25h"):
            out += os.read(master, 65536)
    os.close(master)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.decode())
    assert "[not markup] stays" in text and "step 3/3" in text
    assert b"\x1b[2J" not in out and b"owned\x07" not in out
    assert sys.stdout is not None and out.count(b"\x1b[?25l") == out.count(b"\x1b[?25h")


def test_columns_are_the_hand_drawn_chart():
    assert bar_columns([0.0, 0.5, 1.0, None], 10, 1, 1.0) == ["▁▄█ "]
    assert bar_columns([0.25, 0.75, 1.0], 10, 2, 1.0) == [" ▄█", "▄██"]
    assert bar_columns([0.0, 1.0, 1.0, None, 0.5, 0.5], 3, 1, 1.0) == ["▄█▄"]
    assert bar_columns([], 5, 2, 1.0) == ["", ""]


@pytest.mark.parametrize("width", [1, 7, 79])
def test_shares_always_add_up(width):
    assert bar_shares([0.3, 0.1, 0.5, 0.1], 10) == [3, 1, 5, 1]
    assert sum(bar_shares([1, 1, 1], width)) == width
    assert bar_shares([0, 0], width) == [0, 0]


def test_words_for_numbers_and_times():
    values = [0, 0.451, 9.996, 61.34, 99.97, 3412.4, 3.2e-6, -0.02, 0.9996]
    words = ["0", "0.451", "10.0", "61.3", "100", "3,412", "3.2e-06", "-0.020", "1.00"]
    assert [format_number(value) for value in values] == words
    assert [format_clock(s) for s in (7, 754, 3723)] == ["0:07", "12:34", "1:02:03"]
    times = [format_duration(s) for s in (7.24, 59.97, 372, 12000, 187200)]
    assert times == ["7.2 s", "1 min 0 s", "6 min 12 s", "3 h 20 min", "2 d 4 h"]
    assert make_printable("a\x1b[0m\n\u202eb\tc") == "a�[0m↵�b    c"
    assert prompt_question("Instructions.\nUser: 1 + 1?\nAssistant: <think>") == "1 + 1?"
    assert prompt_question("") == "" and prompt_question("Assistant: hm") == "Assistant: hm"
