"""Mistakes in an environment of the user's are found before a run, named with their place."""

import asyncio
import json
from pathlib import Path

import pytest

from megatron_r1.agents import rows
from megatron_r1.agents.environment import check_parameters, describe, target_of
from megatron_r1.agents.environment_pool import Environments
from megatron_r1.agents.environment_server import _print_description
from megatron_r1.agents.player import EpisodePlayer
from megatron_r1.config import AgentsConfig, Config
from megatron_r1.data.prompts import Prompt
from megatron_r1.data.text import PromptText
from megatron_r1.errors import UserError
from megatron_r1.rl import environments as of_run
from tests.chat_tokenizer import CHATML, chat_tokenizer
from tests.unit.agents import mistaken_environments as own

NAME = "tests.unit.agents.mistaken_environments:Mistaken"
FILE = Path(own.__file__)


def line_of(text):
    return 1 + FILE.read_text().splitlines().index(text)


def model(folder, template=CHATML):
    chat_tokenizer(template).save_pretrained(folder)
    return PromptText(str(folder), "chat")


def test_a_method_that_fails_is_named_with_its_line_the_row_and_the_remedy(tmp_path, monkeypatch):
    monkeypatch.chdir(FILE.parents[3])
    raised = f"{FILE.relative_to(Path.cwd())}:{line_of('            raise KeyError(text)')}"
    row = "for the row kv.jsonl:7 (kv 3)"
    expected = {
        "nan": f"get_reward() returned nan {row}; return a finite number",
        "text": f"get_reward() returned '0.5' {row}; return a number",
        "none": f"get_reward() returned None {row}; return a number",
        "dict": f"reset() returned {{'question': 'x'}} {row}; return the question's text, or None "
        "for the row's",
        "final": f"final_answer: KeyError: '' ({raised}) {row}",
        None: f"reset() needs mistake {row}; the row has question, seed; add the column, or give "
        "mistake a default",
    }
    config = AgentsConfig(environment=NAME, call_seconds=5.0)
    found = {}

    async def check():
        environments = Environments(config, describe(own.Mistaken))
        player = EpisodePlayer(model(tmp_path), environments, config, 1000)
        try:
            for mistake in expected:
                fields = {"mistake": mistake} if mistake else {"seed": 1}
                with pytest.raises(UserError) as error:
                    await player.check(
                        [Prompt("hash", "kv 3", "environment", None, fields, "kv.jsonl:7")]
                    )
                found[mistake] = str(error.value).removeprefix(f"agents.environment: {NAME}.")
        finally:
            await player.close()

    asyncio.run(check())
    assert found == expected


def test_tools_without_self_and_arguments_that_the_class_does_not_take_are_refused():
    with pytest.raises(UserError, match=r"NoSelf.peek\(key\) has no self; write peek\(self, key\)"):
        describe(own.NoSelf)
    with pytest.raises(UserError, match=r"NoArguments.peek\(\) has no self; write peek\(self\)"):
        describe(own.NoArguments)
    with pytest.raises(UserError, match="Mistaken takes hops, not 'hop'; did you mean 'hops'"):
        check_parameters(NAME, describe(own.Mistaken), {"hop": 3})
    with pytest.raises(UserError, match="Misspelt needs table; set agents.parameters: {table: …}"):
        check_parameters("x:Misspelt", describe(own.Misspelt), {})
    check_parameters(NAME, describe(own.Mistaken), {"hops": 3})


def test_a_class_without_get_reward_is_what_a_missing_truth_names(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "describe", lambda name: describe(own.Misspelt))
    path = tmp_path / "kv.jsonl"
    path.write_text(json.dumps({"question": "kv 3", "seed": 1}))
    with pytest.raises(UserError) as error:
        rows.load_rows("mistaken:Misspelt", path=path)
    assert str(error.value).startswith(
        "agents.environment: Misspelt has no get_reward (get_rewards is a tool; did you mean "
        "get_reward?), so kind math grades the answer and needs 'truth': "
    )
    assert "kv.jsonl:1: 'truth' is missing; the row has question, seed;" in str(error.value)


@pytest.mark.parametrize("name", ["kv.Store", "kv.py:Store"])
def test_a_class_that_is_written_otherwise_is_suggested(name):
    with pytest.raises(UserError, match=f"unknown environment '{name}'; did you mean kv:Store?"):
        target_of(name)


def test_a_module_that_cannot_be_imported_is_named_with_file_and_line(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    sources = {"broken_mistake": "x = 1\nclass X(\n", "importing_mistake": "\nimport pandass\n"}
    for module, source in sources.items():
        Path(f"{module}.py").write_text(source)
        _print_description(f"{module}:X")
    errors = [json.loads(line)["error"] for line in capsys.readouterr().out.splitlines() if line]
    assert errors == [
        "agents.environment: broken_mistake:X: SyntaxError: '(' was never closed "
        "(broken_mistake.py:2)",
        "agents.environment: importing_mistake:X: ModuleNotFoundError: No module named 'pandass' "
        "(importing_mistake.py:2)",
    ]


def test_a_run_prints_its_tools_and_warns_of_a_template_that_shows_none(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(of_run, "describe", lambda name: describe(own.Misspelt))
    silent = CHATML[CHATML.index("{% for m in messages %}") :]
    for number, template in enumerate((CHATML, silent)):
        config = Config.model_validate(
            {
                "model": {"path": str(tmp_path / str(number))},
                "data": {"template": "chat"},
                "agents": {"environment": "mistaken:Misspelt", "parameters": {"table": 1}},
            }
        )
        of_run.check_environment(config, model(tmp_path / str(number), template))
        printed = capsys.readouterr()
        assert "tools: get(key, default), get_rewards() (did you mean get_reward?)" in printed.out
        assert ("shows no tools to the model" in printed.err) == bool(number)
