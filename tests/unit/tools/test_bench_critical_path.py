"""The division of a step's time among those who were busy."""

import json

import pytest

from tools.bench.step import critical_path


@pytest.fixture
def timeline(tmp_path):
    """A folder with three steps of 10 s: 6 s of sampling, 3 s of training, 1 s of nothing."""
    controller, core, trainer = [], [], []
    for step in range(4):
        t = 10.0 * step
        controller += [
            (f"step/{step}", t, t),
            ("phase/rollout", t, t + 6),
            ("phase/train", t + 6, t + 9),
            ("controller/pack", t + 6, t + 7),  # in a thread, while the loop waits
            ("controller/idle", t + 1, t + 9),
            ("controller/idle", t + 9.5, t + 10),
            ("cpu", t, 2.0 * step),
        ]
        core += [("core/step, rest", t + 1, t + 5.5), ("core/forward", t + 2, t + 5)]
        trainer += [("trainer/update", t + 7, t + 9), ("core/none", t, t)]
    for number, lines in enumerate((controller, core, trainer)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{number}.jsonl").write_text(text)
    return tmp_path


def test_the_parts_sum_to_the_step_and_name_the_innermost_span(timeline):
    found = critical_path.profile(timeline)
    assert found["steps"] == 2 and found["seconds"] == pytest.approx(10.0)
    path = {(part["phase"], part["busy"]): part["seconds"] for part in found["path"]}
    assert path == pytest.approx(
        {
            ("rollout", "controller/event loop"): 1.0,
            ("rollout", "core/step, rest"): 1.5,
            ("rollout", "core/forward"): 3.0,
            ("rollout", critical_path.NOBODY): 0.5,
            ("train", "controller/pack"): 1.0,
            ("train", "trainer/update"): 2.0,
            ("between", "controller/event loop"): 0.5,
            ("between", critical_path.NOBODY): 0.5,
        }
    )


def test_every_role_is_busy_or_waits(timeline):
    roles = critical_path.profile(timeline)["roles"]
    assert roles["core"]["busy"] == pytest.approx(4.5)
    assert roles["core"]["waiting"] == pytest.approx(5.5)
    assert roles["controller"]["busy"] == pytest.approx(2.5)  # with its thread
    assert roles["controller"]["cpu"] == pytest.approx(2.0)


def test_the_trainer_counts_first_while_the_controller_trains(tmp_path):
    marks = [(f"step/{step}", float(step), float(step)) for step in range(3)]
    busy = [("core/forward", 1.0, 2.0), ("trainer/update", 1.5, 2.0)]
    lines = [*marks, ("phase/train", 1.25, 2.0), ("controller/idle", 0.0, 3.0), *busy]
    (tmp_path / "1.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:5]))
    for number, line in enumerate(busy):
        (tmp_path / f"own{number}.jsonl").write_text(json.dumps(line) + "\n")
    path = critical_path.profile(tmp_path)["path"]
    shares = {(part["phase"], part["busy"]): part["seconds"] for part in path}
    assert shares == pytest.approx(
        {
            ("between", "core/forward"): 0.25,
            ("train", "core/forward"): 0.25,
            ("train", "trainer/update"): 0.5,
        }
    )


def test_a_folder_without_a_timeline_is_named(tmp_path):
    with pytest.raises(SystemExit, match=str(tmp_path)):
        critical_path.profile(tmp_path)
