"""Whole runs whose episodes are played by agents with the `openai` and `anthropic` clients."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from command_line import run

pytestmark = pytest.mark.slow  # two starts of vLLM and of a trainer
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
AGENT = Path(__file__).parent / "two_turn_agent.py"


@pytest.mark.parametrize("harness", ["two_turn_agent:run", [sys.executable, str(AGENT)]])
def test_an_agent_trains(base, tmp_path, harness):
    shutil.copytree(base / "base" / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "chat_template.jinja").write_text(TEMPLATE)
    done = run(
        *("rl", base / "rl.yaml", "--run.folder", tmp_path / "run", "--run.steps", 2),
        *("--model.path", tmp_path / "hf", "--data.template", "chat"),
        *("--rollout.max_response_tokens", 24, "--rl.schedule", "[]"),
        *("--rewards.weights", "{accuracy: 1.0}", "--agents.harness", json.dumps(harness)),
    )
    assert done.returncode == 0, done.stderr + done.stdout
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert len(steps) == 2
    for step in steps:
        assert step["episode/status/done"] + step["episode/status/max_tokens"] == 1.0
        assert step["episode/turns"] > 1 and 0 < step["reward/mean"] < 1
        assert step["logprob_diff/max"] < 1e-3
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").open()]
    turns = [turn["trained"] for turn in samples[0]["turns"]]
    assert turns[:2] == [False, True] and samples[0]["status"] in ("done", "max_tokens")
