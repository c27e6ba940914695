"""Engines on the trainer's GPUs: refused without a share, with the placement that `init` writes."""

import asyncio
import csv
import os
from types import SimpleNamespace

import pytest
import yaml
from refusals import refused
from small_qwen2 import MODEL

from megatron_r1 import config as configuration
from megatron_r1.base.errors import Cause
from megatron_r1.commands import cli, rl, rl_checks
from megatron_r1.commands.parts import torchrun
from megatron_r1.commands.parts.guessed_settings import yaml_value_text
from megatron_r1.commands.rl_checks import check_gpu_memory
from megatron_r1.engines.server import gpu
from megatron_r1.rehearse.model import write_random_model_folder

HF = {**MODEL, "vocab_size": 512, "eos_token_id": 1, "bos_token_id": 0}
PLACEMENT = (
    *("rollout.colocated", "rollout.gpu_memory", "rollout.engines"),
    *("parallel.processes", "push.transport"),
)


@pytest.fixture
def eight_gpus(monkeypatch, tmp_path):
    """A machine with eight GPUs of 80 GiB."""
    monkeypatch.setattr(gpu, "is_usable", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    command = tmp_path / "bin/nvidia-smi"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\nfor gpu in 0 1 2 3 4 5 6 7; do echo 81920; done\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")


@pytest.fixture
def recipe(eight_gpus, tmp_path, monkeypatch):
    """A recipe that says nothing of GPUs, as README's; with the questions in a CSV, too."""
    monkeypatch.chdir(tmp_path)
    write_random_model_folder(tmp_path / "model", HF, seed=0)
    rows = [(f"{a} + 1?", a + 1) for a in range(30)]
    with open("sums.csv", "w", newline="") as file:
        csv.writer(file).writerows([("question", "truth"), *rows])
    tree = {
        "run": {"folder": "run", "steps": 1},
        "model": {"path": "model"},
        "data": {"path": "sums.csv", "template": "{question}"},
        "rollout": {"max_response_tokens": 8},
        "rl": {"prompts_per_rollout": 4, "group_size": 4, "minibatches": 2},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "mine.yaml"


def value_of(recipe, key):
    section, name = key.split(".")
    return getattr(getattr(recipe, section), name)


def test_a_recipe_by_hand_gets_the_placement_that_init_writes(recipe, capsys):
    # What init writes for the same model passes the check ...
    assert cli.main(["init", "model", "sums.csv", "--truth", "truth", "--out", "written.yaml"]) == 0
    written = configuration.load_recipe("written.yaml")
    values = {key: value_of(written, key) for key in PLACEMENT}
    assert values["rollout.colocated"] and values["rollout.engines"] == 8
    assert values["push.transport"] == "cuda_ipc"
    # ... and is what the refusal of the other names.
    shown = [f"{key}: {yaml_value_text(value)}" for key, value in values.items()]
    with refused("rollout.colocated", Cause.CONFLICT, "rollout.gpu_memory", "0.92", *shown):
        rl_checks.check_rl_settings(configuration.load_recipe(recipe))
    by_hand = configuration.load_recipe(recipe, values)
    rl_checks.check_rl_settings(by_hand)
    assert {key: value_of(by_hand, key) for key in PLACEMENT} == values


def test_the_dry_run_is_refused_before_anything_starts(recipe, capsys):
    assert cli.main(["rl", str(recipe), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "rollout.colocated: true" in error and "parallel.processes: 8" in error


def test_each_share_that_is_missing_is_named(recipe):
    def check(**settings):
        keys = {key.replace("__", "."): value for key, value in settings.items()}
        check_gpu_memory(configuration.load_recipe(recipe, keys), HF)

    with refused("rollout.gpu_memory", Cause.MISSING, 0.92):
        check(rollout__colocated=True)
    with refused("rollout.gpu_memory", Cause.MISSING, 0.92):  # a node's GPUs are not the run's
        check(rollout__colocated=True, rollout__placement="hosts")
    check(rollout__placement="hosts")  # on GPUs of their own
    check(rollout__gpu_memory=0.3)
    with refused("teacher.gpu_memory", Cause.MISSING, 0.92):
        check(rollout__gpu_memory=0.3, teacher__path="model")
    check(rollout__gpu_memory=0.3, teacher__path="model", teacher__gpu_memory=0.2)
    both = {"path": "model", "gpu_memory": 0.2, "by_source": {"math": {"path": "model"}}}
    with refused("teacher.by_source.math.gpu_memory", Cause.MISSING, 0.92):
        check(rollout__gpu_memory=0.3, **{f"teacher__{key}": both[key] for key in both})
    check(rollout__gpu_memory=0.3, teacher__path="model", teacher__url=["http://there:8000"])


@pytest.mark.parametrize(
    ("variable", "value"),
    [("PATH", "/nowhere"), ("CUDA_VISIBLE_DEVICES", ""), (torchrun.SPANS_NODES, "1")],
)
def test_where_the_gpus_are_unknown_the_keys_are_named(recipe, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with refused("rollout.colocated", Cause.CONFLICT, "rollout.gpu_memory"):
        check_gpu_memory(configuration.load_recipe(recipe), HF)


def test_on_a_cpu_no_share_is_needed(recipe, monkeypatch):
    monkeypatch.setattr(gpu, "is_usable", lambda: False)
    check_gpu_memory(configuration.load_recipe(recipe), HF)


@pytest.mark.parametrize("has_gpus", [True, False])
@pytest.mark.parametrize("colocated", [True, False])
def test_engines_on_the_trainers_gpus_start_after_it(recipe, monkeypatch, has_gpus, colocated):
    """vLLM measures what is free of a GPU, and fails if that changes while it measures."""
    monkeypatch.setattr(rl_checks.gpu, "is_usable", lambda: has_gpus)
    done = []
    engines_started = asyncio.Event()

    class Trainer:
        ranks = ()

        async def connect(self):
            if not has_gpus and not colocated:
                await engines_started.wait()  # both at once
            done.append("trainer")

        async def call(self, operation, *, free_parameters):
            assert free_parameters
            done.append(operation.__name__)

    class Fleet:
        async def start(self, path, policy_version):
            done.append("engines")
            engines_started.set()

    settings = {"rollout.colocated": colocated, "rollout.gpu_memory": 0.3}
    collector = SimpleNamespace(fleet=Fleet(), teachers=None)
    asyncio.run(rl._start_roles(configuration.load_recipe(recipe, settings), Trainer(), collector))
    in_turn = ["trainer", "free_memory", "engines"] if colocated else ["trainer", "engines"]
    assert done == (in_turn if has_gpus or colocated else ["engines", "trainer"])
