"""What `chat` and `sample RUN_FOLDER` read of a run; the engine answers in tests/system."""

import asyncio
import io
import json
import os
import pty
import shutil
from pathlib import Path

import pytest
from refusals import refused

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause
from megatron_r1.commands import chat, cli, sample
from megatron_r1.commands.parts.trained_model import find_exported, trained_recipe
from megatron_r1.config import parse_recipe
from megatron_r1.trainer.checkpoints.checkpoint_folders import STATE_FILE

LAPTOP = Path(__file__).parents[3] / "examples/laptop/model"


@pytest.fixture
def run_folder(tmp_path):
    run = tmp_path / "mine"
    (run / "hf").mkdir(parents=True)
    (run / "hf/config.json").write_text("{}")
    settings = {
        "data": {"template": "Q: {question}\nA: ", "path": "q.jsonl"},
        "rollout": {"engines": 4, "temperature": 0.7, "max_response_tokens": 99, "colocated": True},
    }
    (run / "config.yaml").write_text(json.dumps(settings))
    return run


def test_a_run_is_asked_as_it_sampled_on_one_engine(run_folder):
    model = find_exported(str(run_folder), "RUN")
    assert model == run_folder / "hf"
    given = parse_recipe({"rollout": {"max_response_tokens": 7}})
    settings = chat._engine_settings(given, model)
    assert settings.data.template == "Q: {question}\nA: "
    rollout = settings.rollout
    assert (rollout.engines, rollout.temperature, rollout.max_response_tokens) == (1, 0.7, 7)
    assert not rollout.colocated
    other = chat._engine_settings(parse_recipe({"data": {"template": "plain"}}), model)
    assert other.data.template == "plain"


def test_a_folder_is_asked_within_what_a_cache_holds(tmp_path):
    shutil.copytree(LAPTOP, tmp_path / "model")
    config = tmp_path / "model/config.json"
    settings = json.loads(config.read_text())
    for positions, lengths in ((131_072, (4096, 512)), (256, (256, 128))):
        config.write_text(json.dumps(settings | {"max_position_embeddings": positions}))
        rollout = chat._engine_settings(parse_recipe({}), tmp_path / "model").rollout
        assert (rollout.max_model_len, rollout.max_response_tokens) == lengths


def test_a_run_without_an_export_is_refused_with_the_command(run_folder, monkeypatch):
    (run_folder / "hf/config.json").unlink()
    with refused("RUN", Cause.MISSING, run_folder):
        find_exported(str(run_folder), "RUN")
    monkeypatch.setattr(
        "megatron_r1.commands.parts.trained_model.complete_checkpoints", lambda folder: [folder]
    )
    with refused("RUN", Cause.MISSING, f"megatron-r1 convert to-hf {run_folder} {run_folder}/hf"):
        find_exported(str(run_folder), "RUN")
    (run_folder / "config.yaml").unlink()
    monkeypatch.undo()
    with refused("RUN", Cause.NOT_FOUND, run_folder):
        find_exported(str(run_folder), "RUN")
    assert trained_recipe(run_folder / "hf") is None


def test_a_checkpoint_is_refused_with_the_command_from_its_parent_folder(run_folder, monkeypatch):
    checkpoint = run_folder / "checkpoints/step_00000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / STATE_FILE).write_text("{}")
    monkeypatch.chdir(checkpoint.parent)
    with refused("RUN", Cause.MISSING, f"to-hf step_00000010 {run_folder}/hf"):
        find_exported("step_00000010", "RUN")


def test_no_question_is_an_error_before_the_engine_starts(run_folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n \n"))
    with refused("stdin", Cause.EMPTY):
        cli._dispatch_command(["chat", str(run_folder)])


@pytest.mark.parametrize(
    ("options", "questions"),
    [
        (["--question", "2 + 3?"], ["2 + 3?"]),
        (["--question", "2 + 3?", "--rollout.dtype=float32", "--question=a=b"], ["2 + 3?", "a=b"]),
    ],
)
def test_several_questions_are_asked_at_once(run_folder, monkeypatch, options, questions):
    asked = []

    async def answer(config, model, given):
        asked.extend(given)

    monkeypatch.setattr(chat, "_run_chat", answer)
    assert cli.main(["chat", str(run_folder), *options]) == 0
    assert asked == questions
    with refused("--question", Cause.MISSING):
        cli._dispatch_command(["chat", str(run_folder), "--question", "2 + 3?", "--question"])
    with refused("--out", Cause.DUPLICATE, 2):
        cli._dispatch_command(["init", "a", "b", "--out", "c", "--out=d"])


def test_sample_takes_a_run_s_folder(run_folder, tmp_path):
    recipe, settings = sample.from_run(str(run_folder))
    config = configuration.load_recipe(recipe, settings)
    assert config.model.path == str(run_folder) and config.model.checkpoint is None
    assert config.run.folder == str(run_folder / "sampled")
    assert config.data.template == "Q: {question}\nA: "
    with refused("RECIPE", Cause.NOT_FOUND, tmp_path):
        sample.from_run(str(tmp_path))


def test_lines_are_read_from_a_terminal_until_its_end(monkeypatch):
    controller, terminal = pty.openpty()
    monkeypatch.setattr("sys.stdin", os.fdopen(terminal))
    os.write(controller, "2 + 3?\n\n¿4 + 4?\n\x04".encode())

    async def read():
        return [line async for line in chat._typed_lines()]

    assert asyncio.run(read()) == ["2 + 3?", "", "¿4 + 4?"]
    os.close(controller)
