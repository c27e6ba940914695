"""The verbs that have a command line of their own: plan and convert."""

import runpy
import sys
from pathlib import Path

import pytest

from megatron_r1.commands import cli

ROOT = Path(__file__).parents[3]
RECIPE = str(ROOT / "examples/one_node/qwen2.5-7b.yaml")


def test_the_verb_plan_prints_what_the_script_prints(capsys, monkeypatch):
    assert cli.main(["plan", RECIPE]) == 0
    by_verb = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["tools/plan", RECIPE])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools/plan"), run_name="__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out == by_verb and "GiB" in by_verb


@pytest.mark.more  # imports torch and Megatron
def test_convert_names_what_is_missing(capsys, tmp_path):
    missing = str(tmp_path / "missing")
    assert cli.main(["convert", "verify", missing, missing]) == 2
    assert missing in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["help"], ["--help"]])
@pytest.mark.parametrize("verb", cli.SELF_PARSING_VERBS)
def test_help_is_the_programs_own(verb, arguments, capsys):
    words = [*arguments, verb] if arguments == ["help"] else [verb, *arguments]
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: megatron-r1 {verb} ")
