"""A run's folder: whole lines, every step once, one writer, no silent change of settings."""

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import yaml
from refusals import refused
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from waiting import wait_until

from megatron_r1.base.errors import Cause
from megatron_r1.base.files import atomic_write
from megatron_r1.config.setting_keys import flatten_sections
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.reporting.trackers.tensorboard_log import TensorBoardLog


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write_steps(folder, first, last):
    for step in range(first, last + 1):
        folder.append_samples([{"step": step, "response": f"{step}a"}, {"step": step}])
        folder.append_metrics({"step": step, "loss": 1.0 / step})


def test_atomic_write_replaces_the_whole_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    assert atomic_write(path, "größer als vorher\n") == path
    atomic_write(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert [f.name for f in path.parent.iterdir()] == ["file.txt"]


def test_a_failed_atomic_write_keeps_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    atomic_write(path, "old")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="28"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["file.txt"]


def test_atomic_write_makes_files_as_readable_as_the_umask_allows(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    atomic_write(tmp_path / "atomic", "x")
    assert (tmp_path / "atomic").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (errno.EROFS, Cause.UNREADABLE),
        (errno.EPERM, Cause.UNREADABLE),
        (errno.EACCES, Cause.UNREADABLE),
        (errno.EEXIST, Cause.MALFORMED),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch, number, cause):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "mkdir", refuse)
    with refused("run.folder", cause, tmp_path / "mine"), RunFolder(tmp_path / "mine"):
        pass


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "checkpoints", "hf", "logs"])
def test_what_an_earlier_run_left_unwritable_is_named_before_the_run_begins(
    tmp_path, monkeypatch, name
):
    path = tmp_path / name
    path.touch() if path.suffix else path.mkdir()
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: p != path and access(p, mode))
    with refused("run.folder", Cause.UNREADABLE, path), RunFolder(tmp_path):
        pass
    monkeypatch.undo()
    with RunFolder(tmp_path):  # the lock of the refused one is released
        pass


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "checkpoints"])
def test_a_folder_in_the_place_of_a_file_is_named_and_the_reverse(tmp_path, name):
    path = tmp_path / name
    path.mkdir() if path.suffix else path.touch()
    with refused("run.folder", Cause.MALFORMED, path), RunFolder(tmp_path):
        pass


@pytest.mark.parametrize("cut", range(1, 26))
def test_every_step_is_there_once_however_the_last_write_was_torn(tmp_path, cut):
    with RunFolder(tmp_path) as folder:
        write_steps(folder, 1, 5)
    for path in (folder.metrics_path, folder.samples_path):
        os.truncate(path, path.stat().st_size - cut)
    with RunFolder(tmp_path) as folder:
        folder.truncate_after(3)
        assert steps_in(folder.metrics_path) == [1, 2, 3]
        assert steps_in(folder.samples_path) == [1, 1, 2, 2, 3, 3]
        write_steps(folder, 4, 6)
    assert steps_in(folder.metrics_path) == [1, 2, 3, 4, 5, 6]
    assert steps_in(folder.samples_path) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]


@pytest.mark.more
def test_killed_writers_lose_only_lines_after_the_checkpoint(tmp_path):
    script = (
        "import sys, os\n"
        "from megatron_r1.reporting.run_folder import RunFolder\n"
        "with RunFolder(sys.argv[1]) as f:\n"
        "    f.truncate_after(int(sys.argv[2]))\n"
        "    for s in range(int(sys.argv[2]) + 1, 10**6):\n"
        "        f.append_samples([{'step': s, 'response': 'x' * 5000}] * 3)\n"
        "        f.append_metrics({'step': s, 'loss': 0.5})\n"
        "        print(s, flush=True)\n"
    )
    for checkpoint, until in ((0, 4), (3, 9), (7, 12)):
        command = [sys.executable, "-c", script, str(tmp_path), str(checkpoint)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if int(line) == until:
                    process.send_signal(signal.SIGKILL)
                    break
    with RunFolder(tmp_path) as folder:
        folder.truncate_after(10)
        assert [m["step"] for m in folder.read_metrics()] == list(range(1, 11))
        assert [s["step"] for s in folder.read_samples()] == [
            s for s in range(1, 11) for _ in "abc"
        ]


def test_truncate_drops_evaluations_too_and_says_how_many_lines(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (0, 10, 20):
        folder.append_evaluation({"step": step, "eval/pass@1": step / 20})
    folder.append_metrics({"step": 20})
    assert folder.truncate_after(10) == 2
    assert [e["step"] for e in folder.read_evaluations()] == [0, 10]
    assert folder.truncate_after(10) == 0
    assert folder.truncate_after(-1) == 2
    folder.append_evaluation({"step": 0, "eval/pass@1": 0.1})
    folder.append_evaluation({"step": 0, "eval/pass@1": 0.2})
    assert folder.read_evaluations() == [{"step": 0, "eval/pass@1": 0.2}]


def test_appending_after_a_torn_line_without_truncation_loses_only_that_line(tmp_path):
    folder = RunFolder(tmp_path)
    write_steps(folder, 1, 2)
    with open(folder.metrics_path, "ab") as file:
        file.write(b'{"step": 3, "lo' + b"s" * 70000)
    assert [m["step"] for m in folder.read_metrics()] == [1, 2]
    RunFolder(tmp_path).append_metrics({"step": 3})
    assert steps_in(folder.metrics_path) == [1, 2, 3]


def test_a_step_cannot_be_written_twice(tmp_path):
    write_steps(RunFolder(tmp_path), 1, 3)
    folder = RunFolder(tmp_path)
    for step in (3, 2):
        with pytest.raises(ValueError, match="3"):
            folder.append_metrics({"step": step})
    for wrong in (None, "4", 4.0, True):
        with pytest.raises(ValueError, match="step"):
            folder.append_metrics({"step": wrong})
    folder.append_metrics({"step": 4})


def test_lines_are_strict_json_and_name_what_was_not_finite(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_metrics(
        {
            "step": 1,
            "kl": float("nan"),
            "loss": np.float32("inf"),
            "accuracy": np.float64(0.25),
            "count": np.int64(3),
            "parts": {"a": float("-inf"), "b": [1, float("nan")]},
            "text": "naïve \ud83d half an emoji\n",
        }
    )

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads(folder.metrics_path.read_bytes(), parse_constant=refuse)
    assert line["kl"] is None and line["loss"] is None and line["accuracy"] == 0.25
    assert line["count"] == 3 and line["parts"] == {"a": None, "b": [1, None]}
    assert line["nonfinite"] == {"kl": "nan", "loss": "inf", "parts.a": "-inf", "parts.b[1]": "nan"}
    with pytest.raises(ValueError, match="bad.*set"):
        folder.append_metrics({"step": 2, "bad": {1, 2}})
    assert len(folder.read_metrics()) == 1


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    folder = RunFolder(tmp_path)
    folder.metrics_path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    for read in (folder.read_metrics, lambda: folder.truncate_after(1)):
        with pytest.raises(ValueError, match="metrics.jsonl, line 2"):
            read()


CONFIG = {
    "run": {"folder": "runs/a"},
    "rl": {"group_size": 16, "learning_rate": 3e-6, "betas": (0.9, 0.95), "num_steps": 100},
    "eval": {"num_samples": 4},
}


def changed(**sections):
    return {name: {**values, **sections.get(name, {})} for name, values in CONFIG.items()}


def begun(path):
    folder = RunFolder(path)
    folder.write_config(CONFIG)
    folder.append_metrics({"step": 1})
    return folder


@pytest.mark.parametrize(
    "made", ["metrics.jsonl", "sample_log/1", "checkpoints/step_1/state", "hf/config.json"]
)
def test_a_run_that_failed_before_its_first_line_may_start_with_other_settings(tmp_path, made):
    folder = RunFolder(tmp_path)
    folder.write_config(CONFIG)
    folder.metrics_path.touch()
    folder.write_config(changed(rl={"group_size": 64}))
    assert flatten_sections(folder.read_config())["rl.group_size"] == 64
    (tmp_path / made).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / made).write_text("{}")
    with refused("rl.group_size", Cause.CHANGED, 64, 16):
        folder.write_config(CONFIG)


def test_the_same_settings_are_accepted_again(tmp_path):
    folder = begun(tmp_path)
    before = folder.config_path.read_bytes()
    folder.write_config(CONFIG)
    assert folder.config_path.read_bytes() == before
    assert folder.read_config()["rl"]["betas"] == [0.9, 0.95]
    assert flatten_sections(folder.read_config())["rl.learning_rate"] == 3e-6


def test_other_settings_are_refused_with_both_values_and_the_remedy(tmp_path):
    folder = begun(tmp_path)
    before = folder.config_path.read_bytes()
    shown = ("rl.group_size: 16", 64, "rl.new", "'x'", "eval.num_samples: 4", 8)
    with refused("eval.num_samples", Cause.CHANGED, *shown) as error:
        folder.write_config(changed(rl={"group_size": 64, "new": "x"}, eval={"num_samples": 8}))
    assert "learning_rate" not in str(error.value)
    assert folder.config_path.read_bytes() == before


def test_settings_that_a_schedule_changes_are_refused_with_an_entry_for_it(tmp_path):
    settings = {"optimizer": {"learning_rate": 2e-5, "beta1": 0.9}, "rl": {"schedule": []}}
    folder = RunFolder(tmp_path)
    folder.write_config(settings)
    folder.append_metrics({"step": 24})
    slower = {"learning_rate": 1e-5, "beta1": 0.8}
    with refused("optimizer.beta1", Cause.CHANGED, 0.9, 0.8) as error:
        folder.write_config({**settings, "optimizer": slower})
    (entry,) = re.findall("{.*}", str(error.value))
    assert yaml.safe_load(entry) == {"from_step": 25, "optimizer.learning_rate": 1e-5}
    with refused("optimizer.beta1", Cause.CHANGED) as error:
        folder.write_config({**settings, "optimizer": {**slower, "learning_rate": 2e-5}})
    assert "rl.schedule" not in str(error.value)


@pytest.mark.parametrize("delta", [False, True])
def test_a_run_of_an_earlier_version_continues_without_keys_that_were_removed(tmp_path, delta):
    now = {"push": {"transport": "gloo"}, "rl": {"group_size": 16}}
    then = {"push": {"transport": "gloo", "delta": delta, "full_every": 50, "memory_gib": None}}
    folder = RunFolder(tmp_path)
    folder.write_config({**now, **then})
    folder.append_metrics({"step": 1})
    folder.write_config(now)
    assert folder.read_config() == now


def test_settings_that_may_change_are_updated(tmp_path):
    folder = begun(tmp_path)
    new = changed(rl={"num_steps": 200}, eval={"num_samples": 8})
    folder.write_config(new, may_change=["rl.num_steps", "eval"])
    assert flatten_sections(folder.read_config())["rl.num_steps"] == 200
    with refused("rl.num_steps", Cause.CHANGED, 200, 300):
        folder.write_config(changed(rl={"num_steps": 300}), may_change=["eval", "rl.num"])


def hold(path, ready):
    with RunFolder(path):
        ready.set()
        signal.pause()  # until it is killed


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=hold, args=(tmp_path, ready), daemon=True)
    holder.start()
    wait_until(lambda: ready.is_set() or not holder.is_alive())
    with refused("run.folder", Cause.BUSY, holder.pid):
        RunFolder(tmp_path).__enter__()
    holder.kill()
    holder.join()
    with RunFolder(tmp_path):
        pass


def test_a_file_system_without_locks_is_not_taken_for_another_run(tmp_path, monkeypatch):
    def without_locks(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", without_locks)
    with refused("run.folder", Cause.UNSUPPORTED, tmp_path):
        RunFolder(tmp_path).__enter__()


def test_a_forked_worker_that_outlives_the_run_does_not_keep_the_lock(tmp_path):
    with RunFolder(tmp_path):
        reader, writer = os.pipe()
        worker = os.fork()
        if worker == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
    command = [sys.executable, "-c", "import sys; from megatron_r1.reporting.run_folder import *"]
    command[-1] += "\nwith RunFolder(sys.argv[1]): print('mine')"
    result = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    os.close(writer)
    os.close(reader)
    os.waitpid(worker, 0)
    assert result.stdout == "mine\n", result.stderr


def test_one_process_cannot_open_a_folder_twice(tmp_path):
    with RunFolder(tmp_path), refused("run.folder", Cause.BUSY):
        RunFolder(tmp_path / ".." / tmp_path.name).__enter__()
    with RunFolder(tmp_path):
        pass


def scalars(folder, tag):
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_shows_every_step_once_after_a_kill_and_resume(tmp_path):
    first = TensorBoardLog(tmp_path)
    for step in range(1, 8):
        first.write({"step": step, "loss": 1.0 * step, "only/before": 1, "note": "x", "kl": None})
    first.close()
    # The kill tore the last event.
    path = next(tmp_path.iterdir())
    os.truncate(path, path.stat().st_size - 5)
    with contextlib.closing(TensorBoardLog(tmp_path, purge_step=4)) as second:
        for step in range(4, 7):
            second.write({"step": step, "loss": 10.0 * step, "bad": float("nan")})
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0), (6, 60.0)]
    assert scalars(tmp_path, "loss") == expected
    assert scalars(tmp_path, "only/before") == [(1, 1.0), (2, 1.0), (3, 1.0)]


def test_tensorboard_steps_are_readable_before_the_log_is_closed(tmp_path):
    with contextlib.closing(TensorBoardLog(tmp_path)) as log:
        log.write({"step": 1, "eval/pass@1": 0.5})
        assert scalars(tmp_path, "eval/pass@1") == [(1, 0.5)]


def test_a_setting_that_is_newer_than_the_run_counts_as_its_default(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.write_config({"data": {"parameters": {"size": 3}}})
        folder.append_metrics({"step": 1})
        defaults = {"data": {"parameters": {}}, "sft": {"order": "shuffled"}}
        newer = {"data": {"parameters": {"size": 3}}, "sft": {"order": "shuffled"}}
        folder.write_config(newer, defaults=defaults)
        with refused("sft.order", Cause.CHANGED):
            folder.write_config({**newer, "sft": {"order": "file"}}, defaults=defaults)
