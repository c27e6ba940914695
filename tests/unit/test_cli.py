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
