"""Runs in W&B (offline) and MLflow (its file store), read back without our code; failures."""

import json
import struct
import threading

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.reporting.trackers import background_tracker, tracker_set, wandb_tracker
from megatron_r1.reporting.trackers.tracker import EVALUATION, STEP_METRIC, TrackedRun
from megatron_r1.reporting.trackers.tracker_set import TrackerSet, check_trackers


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """A slow machine is no failure of a tracker."""
    monkeypatch.setattr(background_tracker, "CLOSE_SECONDS", None)
    for name in ("WANDB_START_SECONDS", "WANDB_FINISH_SECONDS"):
        monkeypatch.setattr(wandb_tracker, name, 10_000)


def line(step, value):
    return {"step": step, "reward/mean": value, "reason": "text", "kl": None}


def track(folder, names, history, steps, evaluations=(), finished=True):
    """Track a start of a run; return what the user was shown."""
    shown = []
    settings = {"rl": {"group_size": 8}, "run": {"seed": 0}}
    trackers = TrackerSet(names, TrackedRun(folder, "a project", settings), shown.append)
    trackers.send_history(history, [])
    for each in steps:
        trackers.send_step(each)
    for each in evaluations:
        trackers.send_evaluation(each)
    trackers.close(finished)
    return shown


def two_starts(folder, name):
    """A start that is killed after step 3, with a checkpoint of step 2, and the next one."""
    folder.mkdir()
    first = [line(step, step / 10) for step in (1, 2, 3)]
    shown = track(folder, [name], [], first, [{"step": 0, "eval/pass@1": 0.25}], False)
    again = [line(step, 10.0 + step) for step in (3, 4)]
    return shown + track(folder, [name], first[:2], again, [{"step": 4, "eval/pass@1": 0.5}])


def records(path):
    """The records of a .wandb file: LevelDB's log format after seven bytes."""
    from wandb.proto import wandb_internal_pb2 as pb

    content, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        size, kind = struct.unpack_from("<HB", content, at + 4)
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        at += -at % 32768 if -at % 32768 < 7 else 0
        if kind in (1, 4):  # full, last
            record = pb.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@pytest.mark.more
def test_wandb_offline_has_every_step_once_and_the_same_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="make test-packages")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(["wandb"])
    assert two_starts(tmp_path / "mine", "wandb") == []
    wandb.teardown()  # its service writes the end of the file when the process ends
    [*_, newest] = sorted((tmp_path / "mine/wandb").glob("offline-*/*.wandb"))
    found = list(records(newest))
    [run] = [record.run for record in found if record.HasField("run")][:1]
    folders = [path.name for path in (tmp_path / "mine/wandb").glob("offline-*")]
    assert len(folders) == 2 and all(f"-{run.run_id}" in name for name in folders)
    assert (run.project, run.display_name) == ("a project", "mine")
    rows = [
        {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
        for record in found
        if record.HasField("history")
    ]
    rewards = [(row["step"], row["reward/mean"]) for row in rows if "reward/mean" in row]
    # A new folder each time, with the lines of metrics.jsonl, so the last one has all of them.
    assert rewards == [(1, 0.1), (2, 0.2), (3, 13.0), (4, 14.0)]
    accuracy = [(row["eval/step"], row["eval/pass@1"]) for row in rows if "eval/step" in row]
    assert accuracy == [(4, 0.5)]


@pytest.mark.more
def test_mlflow_has_every_step_once_in_one_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="make test-packages")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert two_starts(tmp_path / "mine", "mlflow") == []
    client = mlflow.MlflowClient((tmp_path / "mine/mlflow").as_uri())
    experiment = client.get_experiment_by_name("a project").experiment_id
    [run] = client.search_runs([experiment])
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert run.data.params == {"rl.group_size": "8", "run.seed": "0"}
    rewards = client.get_metric_history(run.info.run_id, "reward/mean")
    # A step that is trained again keeps its first figure.
    assert [(m.step, m.value) for m in rewards] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 14.0)]
    accuracy = client.get_metric_history(run.info.run_id, "eval/pass_1")
    assert [(m.step, m.value) for m in accuracy] == [(0, 0.25), (4, 0.5)]


class Server:
    """A tracker whose server fails for the first calls."""

    tracked_steps = {STEP_METRIC: 1.0}
    notes = []

    def __init__(self, failures):
        self.failures, self.sent, self.ended = failures, [], None

    def open(self, run):
        return self

    def send(self, step, numbers):
        if self.failures:
            self.failures -= 1
            raise ConnectionError("no route to host\nmore")
        self.sent.append((step, numbers))

    def finish(self, finished):
        self.ended = finished


def test_a_failing_tracker_is_reported_once_and_gets_every_line_later(tmp_path, monkeypatch):
    server = Server(failures=1)
    monkeypatch.setitem(tracker_set.OPENERS, "wandb", server.open)
    shown = track(tmp_path, ["wandb"], [line(1, 0.1)], [line(2, 0.2), line(3, 0.3)], finished=False)
    if not server.sent:  # the thread may have met all lines at once, and the end
        shown += track(tmp_path, ["wandb"], [line(1, 0.1)], [line(2, 0.2), line(3, 0.3)])
    assert [step for step, _ in server.sent] == [2, 3]
    assert server.sent[0][1] == {"step": 2.0, "reward/mean": 0.2}
    assert len(shown) == 1 and "wandb" in shown[0] and "no route to host" in shown[0]


def test_a_run_does_not_wait_for_its_tracker(tmp_path, monkeypatch):
    server, opening = Server(0), threading.Event()

    def opener(run):
        opening.wait()
        return server

    monkeypatch.setitem(tracker_set.OPENERS, "mlflow", opener)
    trackers = TrackerSet(["mlflow"], TrackedRun(tmp_path, "p", {}), print)
    trackers.send_step(line(2, 0.5))
    trackers.send_evaluation({"step": 2, "eval/accuracy": 1.0})
    assert server.sent == []
    opening.set()
    trackers.close(True)
    assert server.sent[1] == (2, {EVALUATION: 2.0, "eval/accuracy": 1.0}) and server.ended


def test_a_missing_library_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(tracker_set, "find_spec", lambda name: None)
    check_trackers(["tensorboard"])
    with refused("run.trackers", Cause.NOT_INSTALLED, "pip install mlflow-skinny"):
        check_trackers(["tensorboard", "mlflow"])


@pytest.mark.more
def test_wandb_without_a_key_is_refused_before_the_run(monkeypatch, tmp_path):
    wandb = pytest.importorskip("wandb", reason="make test-packages")
    wandb.teardown()  # it keeps the settings of earlier tests
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with refused("WANDB_API_KEY", Cause.MISSING, "WANDB_MODE=offline"):
        check_trackers(["wandb"])
