"""Exit statuses and messages of the command line for failures and mistakes; its help."""

import errno
import os

import pytest

from megatron_r1.base.errors import Cause, TrainerError, UserError
from megatron_r1.commands import cli


def test_a_full_disk_is_a_sentence_and_not_a_traceback(monkeypatch, capsys):
    def write(arguments):
        with open("/dev/full", "wb") as file:
            file.write(b"a line of metrics")

    monkeypatch.setattr(cli, "_dispatch_command", write)
    assert cli.main(["rl"]) == 1
    output = capsys.readouterr().err
    assert "No space left on device" in output and "Traceback" not in output


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_file_that_cannot_be_written_is_named_without_a_traceback(monkeypatch, capsys, number):
    def write(arguments):
        raise OSError(number, os.strerror(number), "/archive/mine.yaml")

    monkeypatch.setattr(cli, "_dispatch_command", write)
    assert cli.main(["init"]) == 2
    assert f"/archive/mine.yaml: {os.strerror(number)}" in capsys.readouterr().err


def test_other_errors_of_the_system_keep_their_traceback(monkeypatch):
    def connect(arguments):
        raise ConnectionRefusedError("nobody listens")

    monkeypatch.setattr(cli, "_dispatch_command", connect)
    with pytest.raises(ConnectionRefusedError):
        cli.main(["rl"])


def test_a_mistake_of_the_user_is_a_message_and_other_value_errors_are_bugs(monkeypatch, capsys):
    def fail(error):
        def dispatch(arguments):
            raise error

        monkeypatch.setattr(cli, "_dispatch_command", dispatch)
        return cli.main(["rl"])

    mistake = UserError(
        "rl.group_size: 0 is too small", key="rl.group_size", cause=Cause.OUT_OF_RANGE
    )
    assert fail(mistake) == 2
    assert capsys.readouterr().err == "megatron-r1: rl.group_size: 0 is too small\n"
    assert fail(TrainerError("trainer rank 0 is gone")) == 1
    assert capsys.readouterr().err == "megatron-r1: trainer rank 0 is gone\n"
    for bug in (ValueError("not enough values"), RecursionError(), RuntimeError("shape mismatch")):
        with pytest.raises(type(bug)):
            fail(bug)


@pytest.mark.parametrize("command", [["rl", "--help"], ["help", "rl"], ["rl", "r.yaml", "-h"]])
def test_a_verb_s_help_is_about_that_verb(command, capsys):
    assert cli.main(command) == 0
    output = capsys.readouterr().out
    assert output.startswith("usage: megatron-r1 rl RECIPE.yaml")
    assert "run.folder, model.path" in output
    assert "rl.group_size: 16 " in output
    assert "sft.batch_size" not in output


@pytest.mark.parametrize(
    ("verb", "shown"),
    [
        ("init", "[--out RECIPE.yaml] [--question COLUMN] [--truth COLUMN] [--kind REWARD]"),
        ("chat", "[--question TEXT] …"),
        ("check-model", "[--json FILE]"),
    ],
)
def test_help_says_what_the_value_of_an_option_is(verb, shown, capsys):
    assert cli.main([verb, "--help"]) == 0
    assert shown in capsys.readouterr().out


@pytest.mark.more
def test_every_verb_has_help(capsys):
    for verb in cli.VERB_MODULES:
        assert cli.main([verb, "--help"]) == 0
        assert f"usage: megatron-r1 {verb} " in capsys.readouterr().out
