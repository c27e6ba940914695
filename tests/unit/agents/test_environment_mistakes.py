"""Mistakes in an environment of the user's are found before a run, named with their place."""

import asyncio
import json
from pathlib import Path

import pytest
from refusals import refused

from megatron_r1.agents import environment_prompts
from megatron_r1.agents.environment import (
    check_parameters,
    describe_environment,
    environment_target,
)
from megatron_r1.agents.environment_pool import EnvironmentPool
from megatron_r1.agents.environment_server import _print_description
from megatron_r1.agents.player import EpisodePlayer
from megatron_r1.base.errors import Cause
from megatron_r1.config import AgentsConfig, Config
from megatron_r1.controller.rollouts import players as of_run
from megatron_r1.data.prompt import Prompt
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from tests.harness.chat_tokenizer import CHATML, chat_tokenizer
from tests.unit.agents import mistaken_environments as own

NAME = "tests.unit.agents.mistaken_environments:Mistaken"
FILE = Path(own.__file__)


def line_of(text):
    return 1 + FILE.read_text().splitlines().index(text)


def model(folder, template=CHATML):
    chat_tokenizer(template).save_pretrained(folder)
    return PromptTokenizer(str(folder), "chat")


def test_a_method_that_fails_is_named_with_its_line_the_row_and_the_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(FILE.parents[3])
    raised = f"{FILE.relative_to(Path.cwd())}:{line_of('            raise KeyError(text)')}"
    shown = {
        "nan": ("get_reward", "nan"),
        "text": ("get_reward", "'0.5'"),
        "none": ("get_reward", "None"),
        "dict": ("reset", "{'question': 'x'}"),
        "final": ("final_answer", "KeyError: ''", raised),
        None: ("reset", "mistake", "question, seed"),
    }
    config = AgentsConfig(environment=NAME, call_seconds=10_000.0)

    async def check():
        environments = EnvironmentPool(config, describe_environment(own.Mistaken))
        player = EpisodePlayer(model(tmp_path), environments, config, 1000)
        try:
            for mistake, names in shown.items():
                fields = {"mistake": mistake} if mistake else {"seed": 1}
                row = Prompt("hash", "kv 3", "environment", None, fields, "kv.jsonl:7")
                with refused("agents.environment", Cause.FAILED, "kv.jsonl:7", *names):
                    await player.check([row])
        finally:
            await player.close()

    asyncio.run(check())


def test_tools_without_self_and_arguments_that_the_class_does_not_take_are_refused():
    key = "agents.environment"
    with refused(key, Cause.MALFORMED, "NoSelf.peek(key)", "peek(self, key)"):
        describe_environment(own.NoSelf)
    with refused(key, Cause.MALFORMED, "NoArguments.peek()", "peek(self)"):
        describe_environment(own.NoArguments)
    with refused("agents.parameters.hop", Cause.UNKNOWN, "Mistaken", "'hops'"):
        check_parameters(NAME, describe_environment(own.Mistaken), {"hop": 3})
    with refused("agents.parameters.table", Cause.MISSING, "Misspelt"):
        check_parameters("x:Misspelt", describe_environment(own.Misspelt), {})
    check_parameters(NAME, describe_environment(own.Mistaken), {"hops": 3})


def test_a_class_without_get_reward_is_what_a_missing_truth_names(tmp_path, monkeypatch):
    monkeypatch.setattr(
        environment_prompts,
        "describe_in_subprocess",
        lambda name: describe_environment(own.Misspelt),
    )
    path = tmp_path / "kv.jsonl"
    path.write_text(json.dumps({"question": "kv 3", "seed": 1}))
    shown = ("Misspelt", "get_rewards", "math", "kv.jsonl:1", "'truth'", "question, seed")
    with refused("agents.environment", Cause.MISSING, *shown):
        environment_prompts.load_environment_prompts("mistaken:Misspelt", path=path)


@pytest.mark.parametrize("name", ["kv.Store", "kv.py:Store"])
def test_a_class_that_is_written_otherwise_is_suggested(name):
    with refused("agents.environment", Cause.UNKNOWN, name, "kv:Store"):
        environment_target(name)


def test_a_module_that_cannot_be_imported_is_named_with_file_and_line(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    sources = {"broken_mistake": "x = 1\nclass X(\n", "importing_mistake": "\nimport pandass\n"}
    for module, source in sources.items():
        Path(f"{module}.py").write_text(source)
        _print_description(f"{module}:X")
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line]
    assert [answer["cause"] for answer in answers] == [Cause.FAILED] * 2
    syntax, imported = (answer["error"] for answer in answers)
    assert "SyntaxError" in syntax and "broken_mistake.py:2" in syntax
    assert "'pandass'" in imported and "importing_mistake.py:2" in imported


def test_a_run_prints_its_tools_and_warns_of_a_template_that_shows_none(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        of_run, "describe_in_subprocess", lambda name: describe_environment(own.Misspelt)
    )
    silent = CHATML[CHATML.index("{% for m in messages %}") :]
    for number, template in enumerate((CHATML, silent)):
        config = Config.model_validate(
            {
                "model": {"path": str(tmp_path / str(number))},
                "data": {"template": "chat"},
                "agents": {"environment": "mistaken:Misspelt", "parameters": {"table": 1}},
            }
        )
        of_run.check_player(config, model(tmp_path / str(number), template))
        printed = capsys.readouterr()
        assert "get(key, default), get_rewards()" in printed.out
        assert bool(printed.err) == bool(number)
