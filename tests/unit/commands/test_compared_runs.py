"""`megatron-r1 compare` on what a run wrote down; on checkpoints:
tests/parallel/test_compared_checkpoints.py."""

import json
import os
import struct
from array import array
from dataclasses import replace

import pytest
import torch

from megatron_r1.base.errors import RunError, UserError
from megatron_r1.base.files.framed_records import append_frame
from megatron_r1.commands.compare.records import is_rounding
from megatron_r1.commands.compare.verb import compare, run
from megatron_r1.config import Config
from megatron_r1.controller.rollouts.group_records import encode, pack
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group
from megatron_r1.data.prompts import make_prompt
from megatron_r1.engines.server.responses import Response
from megatron_r1.reporting.run_folder import RunFolder

STEPS = 3
LENGTH = 5


def response(step: int, index: int) -> GradedResponse:
    tokens = array("i", [100 * step + 10 * index + at for at in range(LENGTH)])
    logprobs = array("f", [-0.1 * (1 + at) for at in range(LENGTH)])
    made = Response(tokens, logprobs, array("i", [step - 1] * LENGTH), "stop", b"")
    return GradedResponse(made, "2", {"accuracy": 1.0}, 1.0, "right", (), True, None, None)


def groups(step: int) -> list[Group]:
    prompts = [make_prompt(f"{step} + {at}", "math", "2", {}) for at in range(2)]
    return [
        Group(prompt, [7, 8, at], [response(step, 2 * at + index) for index in range(2)])
        for at, prompt in enumerate(prompts)
    ]


def write_run(path, change=lambda step, groups, line: groups, dtype="float32", kept=STEPS):
    """Write a run whose groups and metrics `change` may change in a step."""
    folder = RunFolder(path)
    folder.sample_log.mkdir(parents=True)
    settings = Config.model_validate({"model": {"dtype": dtype}})
    folder.write_config(settings.model_dump())
    for step in range(1, STEPS + 1):
        line = {"step": step, "loss": 0.5 + step, "grad_norm": 2.0, "time/step": os.urandom(1)[0]}
        made = change(step, groups(step), line)
        if step <= kept:
            with open(folder.sample_log / f"step_{step:08d}.log", "wb", buffering=0) as file:
                for position, group in enumerate(made):
                    append_frame(file.fileno(), encode(pack(position, group)))
        folder.append_metrics(line)
    return path


def flipped(value: float) -> float:
    """A float32 with its lowest bit flipped."""
    (bits,) = struct.unpack("<i", struct.pack("<f", value))
    return struct.unpack("<f", struct.pack("<i", bits ^ 1))[0]


def of_response(made: list[Group], change) -> list[Group]:
    """Change the second response of the second group."""
    graded = made[1].responses[1]
    made[1].responses[1] = change(graded)
    return made


def token(graded):
    graded.response.token_ids[3] += 1
    return graded


def logprob(graded):
    graded.response.logprobs[2] = flipped(graded.response.logprobs[2])
    return graded


PLANTS = {
    "token": (
        lambda made, line: of_response(made, token),
        ("responses", "group 1, response 1, token 3", False),
    ),
    "logprob": (
        lambda made, line: of_response(made, logprob),
        ("engine log-probabilities", "group 1, response 1, token 2", True),
    ),
    "reward": (
        lambda made, line: of_response(
            made, lambda graded: replace(graded, reward=0.0, rewards={"accuracy": 0.0})
        ),
        ("rewards", "group 1, response 1 by accuracy", False),
    ),
    "routing": (
        lambda made, line: of_response(
            made, lambda graded: replace(graded, response=replace(graded.response, routing=b"\1"))
        ),
        ("responses", "group 1, response 1, routing", False),
    ),
    "sampling mask": (
        lambda made, line: of_response(
            made,
            lambda graded: replace(
                graded, response=replace(graded.response, sampling_mask=b"\1\0\0\0")
            ),
        ),
        ("responses", "group 1, response 1, sampling_mask", False),
    ),
    "prompt": (
        lambda made, line: [made[0], replace(made[1], prompt_ids=[7, 9, 1])],
        ("questions", "group 1, token 1 of the prompt", False),
    ),
    "group": (lambda made, line: made[:1], ("questions", "group 1", False)),
    "loss": (
        lambda made, line: line.update(loss=line["loss"] + 0.5) or made,
        ("training", "loss", False),
    ),
    "grad_norm": (
        lambda made, line: line.update(grad_norm=2.0 + 1e-6) or made,
        ("gradient", "grad_norm", True),
    ),
}


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("name", PLANTS)
def test_one_planted_change_is_found_in_its_step_and_phase(tmp_path, name, step):
    change, expected = PLANTS[name]
    first = write_run(tmp_path / "first")
    second = write_run(
        tmp_path / "second",
        lambda now, made, line: change(made, line) if now == step else made,
    )
    found = compare(first, second)
    assert (found.steps, found.logs, found.settings) == (STEPS, STEPS, [])
    assert [(each.step, each.phase, each.name, each.is_rounding) for each in found.differences] == [
        (step, *expected)
    ]


def test_equal_runs_have_no_difference_but_their_times(tmp_path, capsys):
    first, second = (write_run(tmp_path / name) for name in ("first", "second"))
    run(Config(), str(first), str(second))
    assert "equal: no bit differs" in capsys.readouterr().out


def test_the_answer_says_what_was_compared_and_is_a_failure(tmp_path, capsys):
    first = write_run(tmp_path / "first")
    change = PLANTS["loss"][0]
    second = write_run(
        tmp_path / "second", lambda step, made, line: change(made, line), dtype="bfloat16", kept=1
    )
    answer = tmp_path / "answer.json"
    with pytest.raises(RunError, match="differ at step 1 by more than rounding"):
        run(Config(), str(first), str(second), json=str(answer))
    printed = capsys.readouterr().out
    assert "setting model.dtype: 'float32' and 'bfloat16'" in printed
    assert "metrics of 3 steps, sample logs of 1, checkpoints of 0" in printed
    assert "both kept no checkpoint of step 1" in printed
    found = json.loads(answer.read_text())
    assert found["first"]["name"] == "loss" and found["first"]["values"] == ["1.5", "2"]
    assert found["first"]["distance"] == pytest.approx(0.25)


def test_a_running_run_is_read_and_not_changed(tmp_path):
    first, second = (write_run(tmp_path / name) for name in ("first", "second"))
    log = second / "sample_log" / "step_00000003.log"
    log.write_bytes(log.read_bytes()[:-3])  # its last record is being written
    before = log.read_bytes()
    assert [each.phase for each in compare(first, second).differences] == ["questions"]
    assert log.read_bytes() == before


def test_what_cannot_be_compared_is_refused(tmp_path):
    first = write_run(tmp_path / "first")
    with pytest.raises(UserError, match="no config.yaml is here; give the folder of a run"):
        compare(first, tmp_path)
    empty = RunFolder(tmp_path / "empty")
    empty.path.mkdir()
    empty.write_config(Config().model_dump())
    with pytest.raises(UserError, match="no finished step in common"):
        compare(first, empty.path)


@pytest.mark.parametrize("dtype, units", [("float32", 1024), ("bfloat16", 16)])
def test_rounding_is_a_number_of_unit_roundoffs(dtype, units):
    bound = units * torch.finfo(getattr(torch, dtype)).eps / 2
    assert is_rounding(bound, dtype) and not is_rounding(1.01 * bound, dtype)
