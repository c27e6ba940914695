"""What the command line says of failures that are nobody's mistake in the recipe."""

import pytest

from megatron_r1 import cli


def test_a_full_disk_is_a_sentence_and_not_a_traceback(monkeypatch, capsys):
    def write(arguments):
        with open("/dev/full", "wb") as file:
            file.write(b"a line of metrics")

    monkeypatch.setattr(cli, "_dispatch", write)
    assert cli.main(["rl"]) == 1
    told = capsys.readouterr().err
    assert "the disk is full: " in told and "No space left on device" in told
    assert "run the same command again" in told


def test_other_errors_of_the_system_keep_their_traceback(monkeypatch):
    def connect(arguments):
        raise ConnectionRefusedError("nobody listens")

    monkeypatch.setattr(cli, "_dispatch", connect)
    with pytest.raises(ConnectionRefusedError):
        cli.main(["rl"])


@pytest.mark.parametrize("command", [["rl", "--help"], ["help", "rl"], ["rl", "r.yaml", "-h"]])
def test_a_verb_s_help_is_about_that_verb(command, capsys):
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    assert told.startswith("usage: megatron-r1 rl RECIPE.yaml")
    assert "has to set run.folder, model.path." in told
    assert "rl.group_size: 16   # outputs per question" in told
    assert "sft.batch_size" not in told


def test_every_verb_has_help(capsys):
    for verb in cli.MODULES:
        assert cli.main([verb, "--help"]) == 0
        assert f"usage: megatron-r1 {verb} " in capsys.readouterr().out


def test_help_as_a_setting_s_value_is_a_value(capsys):
    assert cli.main(["score", "in.jsonl", "out.jsonl", "--run.folder", "help"]) == 2
    assert "--run.folder: score does not read it" in capsys.readouterr().err
