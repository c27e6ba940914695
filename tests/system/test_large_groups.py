"""A colocated run with 256 responses to a question and a reference policy, killed and continued."""

import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import command, environment, run
from run_progress import left_behind, lines, wait_for
from safetensors.torch import load_file
from waiting import wait_until

from megatron_r1.base.files.framed_records import FramedFile
from megatron_r1.controller.rollouts.group_records import GroupRecord, decode
from megatron_r1.models.weights.formats.dcp import DistributedCheckpoint

pytestmark = pytest.mark.more

STEPS, GROUP = (1, 2, 3), 256
SETTINGS = {
    "run.steps": len(STEPS),
    "rollout.colocated": "true",
    "rl.group_size": GROUP,
    "rl.prompts_per_rollout": 2,
    "rl.kl_beta": 0.02,
    "parallel.share_prompts": "true",
    "checkpoint.keep": len(STEPS),
    "data.num_heldout": 0,
}
SAME = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}
"""Parameters that Megatron and Hugging Face store alike, but for Megatron's rows of padding."""


@pytest.fixture(scope="module")
def continued(base) -> Path:
    """The folder of a run that was killed once its first checkpoint was written."""
    folder = base / "groups_of_256"
    options = [f"--{key}={value}" for key, value in SETTINGS.items()]
    words = [base / "rl.yaml", f"--run.folder={folder}", *options]
    process = subprocess.Popen(
        command("rl", *words),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    first = folder / "checkpoints/step_00000001/manifest.json"
    wait_for(process, "its first checkpoint", first.exists)
    process.kill()
    process.communicate()
    wait_until(lambda: not left_behind(folder))
    assert not (folder / "checkpoints/step_00000003").exists(), "it was over before the kill"
    done = run("rl", *words)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "continuing after step" in done.stdout
    return folder


def stored(folder: Path, step: int, prefix: str) -> dict[str, torch.Tensor]:
    """The weights of a step's checkpoint whose names begin with `prefix`, without it."""
    checkpoint = DistributedCheckpoint(folder / f"checkpoints/step_{step:08d}")
    return {
        name.removeprefix(prefix): checkpoint.read(name, [0] * len(shape), shape)
        for name, shape in checkpoint.shapes.items()
        if name.startswith(prefix)
    }


def logged(folder: Path, step: int) -> list[GroupRecord]:
    """The groups of a step in the sample log."""
    frames = FramedFile.read(folder / f"sample_log/step_{step:08d}.log")
    return [record for record in map(decode, frames) if isinstance(record, GroupRecord)]


def test_every_one_of_256_responses_is_logged_and_trained_on(continued):
    metrics = lines(continued / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(STEPS)
    for line in metrics:
        assert line["step_taken"] == 1 and line["groups/zero_variance"] < 1
        # fp32 on both sides: 4e-7. One response of another prompt or version differs by more than
        # 0.1 a token, 2e-4 in the mean over all of them; a token whose experts are almost equally
        # good, by up to 0.6, 1e-4 in the mean.
        assert line["logprob_diff/mean"] < 1e-4
        # 255 of 256 prompts, each but for its last token, are not computed again.
        assert 0.1 < line["packing/shared"] < 0.5
    for line in metrics[1:]:  # the first step's log went with its checkpoint
        groups = logged(continued, line["step"])
        assert [len(group.responses) for group in groups] == [GROUP, GROUP]
        answers = [one for group in groups for one in group.responses]
        assert len({bytes(one.token_ids) for one in answers}) > 100, "requests drew the same"
        lengths, rewards = [len(one.token_ids) // 4 for one in answers], [a.reward for a in answers]
        assert line["response_length/mean"] == pytest.approx(np.mean(lengths))
        assert line["reward/mean"] == pytest.approx(np.mean(rewards))


def test_a_continued_run_keeps_the_policy_that_it_began_with_as_reference(base, continued):
    first = load_file(base / "base/hf/model.safetensors")
    references = [stored(continued, step, "reference.") for step in STEPS]
    for reference in references:
        assert reference.keys() == references[0].keys()
        for name, tensor in reference.items():
            assert tensor.equal(references[0][name]), f"{name} is not the first reference's"
        for name, hf_config in SAME.items():
            assert reference[name][: len(first[hf_config])].equal(first[hf_config]), name
    # The policy has moved meanwhile, on both sides of the kill.
    policies = [stored(continued, step, "embedding.") for step in STEPS]
    name = "word_embeddings.weight"
    moved = [references[0][f"embedding.{name}"], *(policy[name] for policy in policies)]
    assert not any(a.equal(b) for a, b in pairwise(moved))
    assert lines(continued / "metrics.jsonl")[-1]["kl"] > 1e-4
