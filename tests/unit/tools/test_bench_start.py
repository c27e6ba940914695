"""The bench of starts: points of processes, opened files, what is not the command's own."""

import json

import pytest

from tools.bench import start


def test_points_are_in_order_with_their_processes_cpu_and_the_first_token(tmp_path):
    records = {
        "controller": [("point/controller/ready", 12.0, 12.0), ("cpu", 12.0, 2.5)],
        "engine": [
            ("point/engine/imports made", 11.0, 11.0),
            ("cpu", 11.0, 4.0),
            ("core/make outputs", 13.0, 13.5),
            ("core/make outputs", 14.0, 14.5),
            ("cpu", 14.0, 5.0),
        ],
    }
    for name, lines in records.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    assert start.timeline_points(tmp_path, 10.0) == [
        (1.0, "engine", "imports made", 4.0),
        (2.0, "controller", "ready", 2.5),
        (3.5, "engine", "first sampled token", pytest.approx(4.0 + 1.0 * 2.5 / 3 - 4.0)),
    ]


def test_opened_files_are_counted_by_role(tmp_path):
    data = tmp_path / "data"
    data.write_bytes(bytes(2 << 20))
    ranks = [
        'execve("/bin/python", ["python", "-m", "megatron_r1.trainer.rank"], …) = 0',
        f'openat(AT_FDCWD, "{data}", O_RDONLY) = 3',
        f'openat(AT_FDCWD, "{data}", O_RDONLY) = 3',
        'openat(AT_FDCWD, "/none", O_RDONLY) = -1 ENOENT (No such file or directory)',
    ]
    (tmp_path / "trace.1").write_text("\n".join(ranks))
    (tmp_path / "trace.2").write_text(f'openat(AT_FDCWD, "{data}", O_RDONLY) = 4\n')
    assert start.opened_files(tmp_path.glob("trace.*")) == {
        "trainer": "2 opens of 1 files of 2 MiB, 1 not found",
        "controller": "1 opens of 1 files of 2 MiB, 0 not found",
    }


def test_lines_on_the_screen_are_the_commands_own_or_not():
    lines = ["megatron-r1: stopped", "", "UserWarning: Apex is not installed"]
    assert start.foreign_lines(lines) == lines[2:]
