"""Two steps of `rl` and `sft` on rows in the shapes of public data sets (`tests/shapes`), by the
recipes that `init` writes for them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_line import environment
from run_progress import lines

SHAPES = Path(__file__).parents[1] / "shapes"
CASES = yaml.safe_load((SHAPES / "shapes.yaml").read_text(encoding="utf-8"))
IN_MORE = ("gsm8k.jsonl", "search_r1.jsonl", "sharegpt.jsonl")
"""Truths as text, as tests and as any of several; conversations and calls of tools. The other files
are slow."""
SMALL = {
    **{"run.steps": 2, "checkpoint.every": 2, "optimizer.learning_rate": 1e-4},
    **{"parallel.processes": 1},
}
ROLLOUT = {
    **{"rl.prompts_per_rollout": 2, "rl.group_size": 2, "rl.minibatches": 1},
    **{"rollout.max_response_tokens": 12, "rollout.max_num_seqs": 16, "eval.every": 0},
    # The model writes noise; a third of it ends in no program, which is a grade of 0.
    **{"rewards.weights": "{accuracy: 1.0}"},
}
CHAT = (
    "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def chat_model(base, tmp_path_factory):
    """The base model with room for long prompts, and a chat template."""
    folder = tmp_path_factory.mktemp("shapes") / "hf"
    folder.mkdir()
    for path in (base / "base/hf").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").write_text(CHAT)
    settings = json.loads((folder / "config.json").read_text())
    settings["max_position_embeddings"] = max(2048, settings["max_position_embeddings"])
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def run():
    """A function that runs a command line and returns its output; all run in one process."""
    command = [sys.executable, "-m", "shapes_commands"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(), **pipes) as process:

        def run_one(*arguments):
            process.stdin.write(json.dumps(list(map(str, arguments))) + "\n")
            process.stdin.flush()
            status, output = json.loads(process.stdout.readline())
            assert not status, output
            return output

        yield run_one
        process.stdin.close()


def options(settings):
    return [text for key, value in settings.items() for text in (f"--{key}", str(value))]


@pytest.mark.more
@pytest.mark.parametrize(
    "name",
    [name if name in IN_MORE else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_init_a_dry_run_and_two_steps(chat_model, run, tmp_path, name):
    recipe, folder = tmp_path / "mine.yaml", tmp_path / "run"
    run("init", chat_model, SHAPES / name, "--out", recipe)
    verb = "sft" if "learned" in CASES[name] else "rl"
    own = SMALL | {"run.folder": folder} | (ROLLOUT if verb == "rl" else {"sft.batch_size": 2})
    if verb == "sft":
        own["sft.epochs"] = "null"
    run(verb, recipe, *options(own), "--dry-run")
    run(verb, recipe, *options(own))
    metrics = lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2]
    if verb == "rl":
        assert all(line["reward/mean"] >= 0 for line in metrics)
    else:
        assert all(line["loss"] > 0 for line in metrics)
