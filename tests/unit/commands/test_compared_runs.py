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
from megatron_r1.commands.compare.runs import MAX_IN_ORDER, compare_runs
from megatron_r1.commands.compare.verb import run
from megatron_r1.config import Config
from megatron_r1.controller.rollouts.group_records import encode, to_record
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group
from megatron_r1.data.prompt import make_prompt
from megatron_r1.engines.server.responses import Response
from megatron_r1.models.weights.formats.dcp_writer import Chunk, write_chunks, write_metadata
from megatron_r1.reporting.run_folder import RunFolder
from megatron_r1.trainer.checkpoints.checkpoint_folders import checkpoint_path
from megatron_r1.trainer.checkpoints.manifest import write_manifest

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
                    append_frame(file.fileno(), encode(to_record(position, group)))
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


@pytest.mark.first_cases(3)
@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("name", PLANTS)
def test_one_planted_change_is_found_in_its_step_and_phase(tmp_path, name, step):
    change, expected = PLANTS[name]
    first = write_run(tmp_path / "first")
    second = write_run(
        tmp_path / "second",
        lambda now, made, line: change(made, line) if now == step else made,
    )
    found = compare_runs(first, second)
    assert (found.num_steps, found.num_logs, found.settings) == (STEPS, STEPS, [])
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


KEY = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"


def write_checkpoints(run_folder, steps, changed_step=None):
    """Write a checkpoint of one tensor after each step; one of them alone may have another."""
    for step in steps:
        folder = checkpoint_path(RunFolder(run_folder).checkpoints, step)
        folder.mkdir(parents=True)
        values = torch.arange(24, dtype=torch.float32).view(4, 2, 3) + 1 + step
        if step == changed_step:
            values[3, 0, 1] += 1
        chunk = Chunk(KEY, (0, 0, 0), (4, 2, 3))
        written = write_chunks(folder / "__1_0.distcp", [(chunk, values)])
        write_metadata(folder, {KEY: (4, 2, 3)}, {KEY: torch.float32}, written)
        write_manifest(folder)


def change_file(path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


@pytest.fixture
def pair(tmp_path):
    """Two equal runs with a checkpoint of every step."""
    runs = [write_run(tmp_path / name) for name in ("first", "second")]
    for path in runs:
        write_checkpoints(path, range(1, STEPS + 1))
    return runs


def test_a_bit_of_a_saved_file_is_found_though_the_manifests_are_equal(pair, capsys):
    first, second = pair
    folder = checkpoint_path(RunFolder(second).checkpoints, 2)
    value = 3 + 3 * 6 + 1  # the number at [3, 0, 1] after two steps
    change_file(
        folder / "__1_0.distcp", struct.pack("<f", value), struct.pack("<f", flipped(value))
    )
    found = compare_runs(first, second)
    (difference,) = found.differences
    assert (difference.step, difference.name, difference.ranks) == (2, KEY, ([1], [1]))
    assert difference.place.startswith("at [3, 0, 1], 1 of 24")
    assert len(found.damaged_files) == 1 and str(folder) in found.damaged_files[0]
    with pytest.raises(RunError, match="cannot be called equal: .*checksum it was written with"):
        run(Config(), str(first), str(second))
    assert "equal: no bit differs" not in capsys.readouterr().out


def test_a_changed_file_whose_tensors_are_equal_is_not_called_equal(pair, capsys):
    first, second = pair
    (checkpoint_path(RunFolder(second).checkpoints, 1) / "common.pt").write_bytes(b"zz")
    with pytest.raises(RunError, match=r"common\.pt has 2 bytes"):
        run(Config(), str(first), str(second))
    assert "equal: no bit differs" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "metadata.json"])
def test_a_checkpoint_that_cannot_be_read_is_refused(pair, name):
    first, second = pair
    (checkpoint_path(RunFolder(second).checkpoints, 3) / name).write_bytes(b"zz")
    with pytest.raises(UserError, match="use another checkpoint"):
        compare_runs(first, second)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_change_in_one_checkpoint_alone_is_found(tmp_path, step):
    first, second = (write_run(tmp_path / name) for name in ("first", "second"))
    write_checkpoints(first, range(1, STEPS + 1))
    write_checkpoints(second, range(1, STEPS + 1), step)
    (difference,) = compare_runs(first, second).differences
    assert (difference.step, difference.name) == (step, KEY)


@pytest.mark.more
def test_bisection_of_many_checkpoints_says_what_it_assumes(tmp_path, capsys):
    first, second = (write_run(tmp_path / name) for name in ("first", "second"))
    for path in (first, second):
        write_checkpoints(path, range(1, MAX_IN_ORDER + 2))
    run(Config(), str(first), str(second))
    printed = capsys.readouterr().out
    assert "by bisection 6 of them were read: a difference in one checkpoint alone" in printed
    assert "equal: no bit differs in what was read" in printed


@pytest.mark.parametrize("damage", ["cut off", "flipped", "emptied"])
def test_damaged_groups_of_a_log_are_no_difference_and_not_equal(tmp_path, damage):
    first, second = (write_run(tmp_path / name) for name in ("first", "second"))
    log = second / "sample_log" / "step_00000003.log"
    content = bytearray(log.read_bytes())
    if damage == "cut off":
        del content[-3:]
    else:
        content[len(content) // 4] ^= 1
        if damage == "emptied":
            content[-1] ^= 1
    log.write_bytes(content)
    found = compare_runs(first, second)
    assert found.differences == [] and log.read_bytes() == content
    assert len(found.damaged_files) == 1 and f"{log}: " in found.damaged_files[0]
    with pytest.raises(RunError, match="belong to no whole record, so . groups?"):
        run(Config(), str(first), str(second))


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        ("config.yaml", "model:", "model: [", r"config\.yaml: not YAML"),
        ("config.yaml", "  dtype: float32\n", "", "model.dtype is not set, not one of float32"),
        ("metrics.jsonl", '"step": 2, ', "", "line 2: step is not set, not an integer"),
        ("metrics.jsonl", '"step": 2', '"step": "2"', "line 2: step is '2', not an integer"),
    ],
)
def test_a_damaged_record_of_a_run_is_refused_by_name(tmp_path, name, old, new, message):
    first, second = (write_run(tmp_path / name) for name in ("first", "second"))
    text = (second / name).read_text()
    assert old in text
    (second / name).write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        compare_runs(first, second)


def test_what_cannot_be_compared_is_refused(tmp_path):
    first = write_run(tmp_path / "first")
    with pytest.raises(UserError, match="no config.yaml is here; give the folder of a run"):
        compare_runs(first, tmp_path)
    empty = RunFolder(tmp_path / "empty")
    empty.path.mkdir()
    empty.write_config(Config().model_dump())
    with pytest.raises(UserError, match="no finished step in common"):
        compare_runs(first, empty.path)


@pytest.mark.parametrize("dtype, units", [("float32", 1024), ("bfloat16", 16)])
def test_rounding_is_a_number_of_unit_roundoffs(dtype, units):
    bound = units * torch.finfo(getattr(torch, dtype)).eps / 2
    assert is_rounding(bound, dtype) and not is_rounding(1.01 * bound, dtype)
