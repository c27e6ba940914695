"""Served models run before their stage and end after it, also when it fails."""

import json
import re
import socket
import sys
from pathlib import Path

import pytest
from pipeline_world import World, processes_naming
from waiting import wait_until

from megatron_r1.pipeline.pipeline_recipe import ServeConfig
from megatron_r1.pipeline.serving import choose_ports, server_command

SERVER = Path(__file__).parent / "small_server.py"
RECIPE = f"""
pipeline: {{folder: out}}
stages:
  asks:
    verb: make
    function: "tiny:ask"
    arguments: {{url: ${{serve.judge.url}}}}
    serve:
      judge: {{command: [{sys.executable}, {SERVER}, "{{host}}", "{{port}}", 0.5, FATE, MARK]}}
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return World(tmp_path, recipe(tmp_path, "lives"))


def recipe(path, fate):
    return RECIPE.replace("FATE", fate).replace("MARK", mark(path))


def mark(path):
    return f"mark-{path.name}"


def test_a_server_is_ready_before_its_stage_and_gone_after(world, capsys):
    assert world.run() == 0
    answer = json.loads((world.out / "asks/answer.json").read_text())
    assert world.record("asks")["attempts"][0]["seconds"] > 0.5
    assert 20_000 <= answer["port"] < 32_000
    assert processes_naming(mark(world.path)) == []
    # Another port is no other result.
    assert world.states(capsys) == {"asks": "done"}
    assert world.record("asks")["settings"]["arguments.url"] == "http://judge.served"


@pytest.mark.more
def test_a_server_does_not_outlive_a_killed_pipeline_and_comes_back_where_it_was(
    world, monkeypatch
):
    temporary = world.path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    (world.path / "tiny.py").write_text(
        "import time, pathlib\n"
        "def ask(folder, url):\n"
        "    (folder / 'url').write_text(url)\n"
        "    while not pathlib.Path('go').exists(): time.sleep(0.02)\n"
    )
    process = world.start()
    wait_until(lambda: (world.out / "asks/url").exists())
    url = (world.out / "asks/url").read_text()
    assert len(processes_naming(mark(world.path))) >= 1
    process.kill()
    process.wait()
    process.stdout.close()
    wait_until(lambda: not processes_naming(mark(world.path)))
    (world.path / "go").touch()
    assert world.run() == 0
    assert (world.out / "asks/url").read_text() == url
    assert not list(temporary.iterdir())
    assert processes_naming(mark(world.path)) == []


def test_a_server_that_does_not_start_fails_its_stage_with_its_log(world, capsys):
    world.write(recipe(world.path, "broken"))
    assert world.run() == 1
    output = capsys.readouterr().err
    assert "serve.judge" in output and "ValueError: this server cannot start" in output
    assert world.states(capsys) == {"asks": "failed"}


def test_a_server_that_dies_ends_its_stage(world, capsys):
    world.write(recipe(world.path, "dies"))
    (world.path / "tiny.py").write_text(
        "import time, urllib.request\n"
        "def ask(folder, url):\n"
        "    urllib.request.urlopen(url + '/answer').read()\n"
        "    time.sleep(3600)\n"
    )
    assert world.run() == 1
    assert "serve.judge" in (error := capsys.readouterr().err) and "status 3" in error
    assert processes_naming(str(world.out)) == []


def test_a_server_that_is_never_ready_runs_out_of_time(world, capsys):
    slow = recipe(world.path, "lives").replace("0.5, lives", "1e9, lives")
    world.write(slow.replace("judge: {", "judge: {timeout_seconds: 1, "))
    assert world.run() == 1
    assert "serve.judge" in (error := capsys.readouterr().err) and "timeout_seconds" in error
    assert processes_naming(mark(world.path)) == []


def test_a_port_that_was_taken_meanwhile_is_named(monkeypatch):
    monkeypatch.setattr("megatron_r1.pipeline.serving.END_SECONDS", 0.1)
    config = ServeConfig(command=["x"])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=rf"serve\.judge.* {port} "):
            choose_ports({"judge": config}, {"judge": port})
    assert choose_ports({"judge": config}, {"judge": port}) == {"judge": port}
    several = choose_ports(dict.fromkeys("abc", config), {})
    assert len(set(several.values())) == 3


def test_vllm_is_started_by_the_name_a_recipe_gives_it():
    config = ServeConfig(model="m/hf", task="classify", arguments=["--max-model-len", 64])
    line = " ".join(server_command("helpful", config, 1234))
    assert re.search(r"engines.plugin\.serve --model m/hf --served-model-name helpful", line)
    assert "--host 127.0.0.1 --port 1234 --runner pooling" in line
    assert line.endswith("--max-model-len 64")
    assert "pooling" not in " ".join(server_command("j", ServeConfig(model="m"), 1))
