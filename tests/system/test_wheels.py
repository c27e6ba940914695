"""What a release has, installed and used outside the repository: what a wheel lacks would be missed
there. Packages that they depend on are this environment's."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import command_line
import pytest
import tiny_models

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = {"megatron_r1": ".", "r1_kernels": "kernels", "r1_grading": "grading"}

pytestmark = pytest.mark.more


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of the three installed wheels, built from the files that git has."""
    source = tmp_path_factory.mktemp("source")
    listing = [
        "git",
        "ls-files",
        "-z",
        "megatron_r1",
        "kernels",
        "grading",
        "*.toml",
        "*.py",
        "*.md",
    ]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    folders = [str(source / folder) for folder in DISTRIBUTIONS.values()]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "dist"]
    subprocess.run([*pip, *build, *folders], cwd=source, check=True)
    wheels = sorted(map(str, (source / "dist").glob("*.whl")))
    assert len(wheels) == len(DISTRIBUTIONS)
    target = tmp_path_factory.mktemp("installed")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(target), *wheels], check=True)
    return target


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    plain = tmp_path_factory.mktemp("plain")
    command_line.write_model(plain)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_models.write_model(folder, json.loads((plain / "config.json").read_text()), seed=0)
    shutil.copytree(plain, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def run(installed, tmp_path):
    """A call of the installed command in an empty folder, which returns what it prints."""

    def run_command(*words):
        command = [installed / "bin" / "megatron-r1", *map(str, words)]
        environment = os.environ | {"PYTHONPATH": str(installed)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run_command


@pytest.mark.parametrize("package", DISTRIBUTIONS)
def test_the_packages_are_those_of_the_wheels(installed, tmp_path, package):
    program = f"import {package}; print({package}.__file__)"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", program]
    path = subprocess.check_output(command, cwd=tmp_path, env=environment, text=True).strip()
    assert Path(path).is_relative_to(installed)


def test_plan(run, model, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "run": {"folder": "run"},
                "model": {"path": str(model)},
                "rollout": {"max_response_tokens": 128},
            }
        )
    )
    assert "fits" in run("plan", recipe, "--parallel.processes", 8)


def test_convert(run, model, tmp_path):
    run("convert", "from-hf", model, tmp_path / "checkpoint")
    run("convert", "to-hf", tmp_path / "checkpoint", tmp_path / "back")
    assert "tensors" in run("convert", "verify", model, tmp_path / "back")


def test_score(run, tmp_path):
    lines = [
        {"kind": "math", "response": "It is \\boxed{13}.", "truth": "13"},
        {"kind": "math", "response": "It is \\boxed{12}.", "truth": "13"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    run("score", "in.jsonl", "out.jsonl")
    graded = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert [line["reward"] for line in graded] == [1, 0]


def test_init(run, model, tmp_path):
    questions = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(64)]
    rows = "".join(f"{json.dumps(row)}\n" for row in questions)
    (tmp_path / "questions.jsonl").write_text(rows)
    run("init", model, "questions.jsonl", "--out", "recipe.yaml")
    assert str(model) in (tmp_path / "recipe.yaml").read_text()
