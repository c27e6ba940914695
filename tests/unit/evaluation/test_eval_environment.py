"""`megatron-r1 eval` plays the held-out rows of environments, here with a scripted policy."""

import json
import re
from array import array
from types import SimpleNamespace

import pytest
import torch
from refusals import refused
from safetensors.torch import save_file

from megatron_r1.base.errors import Cause
from megatron_r1.commands import cli
from megatron_r1.commands.cli import main
from megatron_r1.engines.server.responses import Response
from megatron_r1.evaluation.engine_model import EngineModel
from megatron_r1.evaluation.sampling import sample_seed
from tests.harness.chat_tokenizer import chat_tokenizer

COUNTER = "tests.unit.agents.own_environments:Counter"
ROWS = [{"question": f"row {i}", "truth": 20 + i} for i in range(20)]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe of a run in an environment, its model's folder, and engines that count.

    An odd seed stops at the right number, which is a reward of 0, an even one at the next."""
    folder = tmp_path / "model"
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["Qwen2ForCausalLM"],
                "model_type": "qwen2",
                "vocab_size": len(tokenizer),
                "max_position_embeddings": 1024,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "num_hidden_layers": 1,
            }
        )
    )
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    calls = []

    async def generate(token_ids, *, seed, **_):
        calls.append(seed)
        text = tokenizer.decode(token_ids)
        truth = int(re.search(r"Count to (\d+)", text)[1])
        call = {"name": "add", "arguments": {"number": truth + 1 - seed % 2}}
        answer = "Done." if '"total"' in text else f"<tool_call>{json.dumps(call)}</tool_call>"
        ids = array("i", [*tokenizer.encode(answer), tokenizer.eos_token_id])
        logprobs, versions = array("f", [-1.0] * len(ids)), array("i", [0] * len(ids))
        return [Response(ids, logprobs, versions, "stop")]

    async def start(self):
        state = SimpleNamespace(require_usable=lambda: None)
        self._fleet = SimpleNamespace(generate=generate, state=state)

    monkeypatch.setattr(EngineModel, "start", start)
    path = tmp_path / "run.yaml"

    def write(benchmarks, template="chat"):
        path.write_text(
            f"""
run: {{folder: {tmp_path}/out, seed: 3}}
model: {{path: {folder}}}
data: {{path: {tmp_path}/rows.jsonl, template: {template}, heldout_fraction: 0.2}}
agents: {{environment: "{COUNTER}", call_seconds: 3600}}
rollout: {{max_response_tokens: 200, max_model_len: 1024}}
rewards: {{workers: 1, timeout_seconds: 600}}
eval: {{samples: 4, benchmarks: {json.dumps(benchmarks)}}}
"""
        )
        return str(path)

    return SimpleNamespace(write=write, calls=calls, rows=str(tmp_path / "rows.jsonl"))


@pytest.mark.more
def test_rows_are_played_and_graded_by_their_environment(recipe, tmp_path):
    twice = {"name": f"environment/{COUNTER}", "path": recipe.rows, "limit": 3, "samples": 2}
    twice |= {"label": "twice", "options": {"step": 2}}
    path = recipe.write(["environment", twice])
    assert main(["eval", path]) in (0, None)
    results = json.loads((tmp_path / "out/eval.json").read_text())["benchmarks"]
    lines = [json.loads(x) for x in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    held_out = {line["id"] for line in lines if line["benchmark"] == "environment"}
    assert 0 < len(held_out) < 10, "the rows that training with this recipe leaves out"
    is_correct = {
        name: [(sample_seed(3, ("environment", name), i) + 1) % 2 for i in range(4)]
        for name in held_out
    }
    metrics = results["environment"]["metrics"]
    share = sum(sum(r) for r in is_correct.values()) / (4 * len(is_correct))
    assert metrics["pass@1"]["value"] == pytest.approx(share)
    share = sum(any(r) for r in is_correct.values()) / len(is_correct)
    assert metrics["pass@4"]["value"] == pytest.approx(share)
    assert not any(name.startswith("cons@") for name in metrics)
    assert len([line for line in lines if line["benchmark"] == "twice"]) == 6
    for line in lines:
        assert line["status"] == "done" and line["reason"] == "done: the environment's reward"
        assert [turn["role"] for turn in line["turns"]] == [
            "user",
            "assistant",
            "tool",
            "assistant",
        ]
    page = (tmp_path / "out/report.html").read_text()
    assert page.count('<li class="trained">') == page.count("&lt;tool_call&gt;") * 2 > 0
    # The same command continues: all is there.
    num_calls = len(recipe.calls)
    assert num_calls == 2 * len(lines)
    assert main(["eval", path]) in (0, None) and len(recipe.calls) == num_calls


@pytest.mark.parametrize(
    ("benchmark", "template", "key", "cause"),
    [
        ("environment", "r1_zero", "data.template", Cause.CONFLICT),
        (
            {"name": "environment", "instruction": "{question}"},
            *("chat", "eval.benchmarks", Cause.UNSUPPORTED),
        ),
        ("environment/nosuch", "chat", "agents.environment", Cause.UNKNOWN),
    ],
)
def test_what_cannot_be_played_is_refused(recipe, benchmark, template, key, cause):
    with refused(key, cause):
        cli._dispatch_command(["eval", recipe.write([benchmark], template)])
