"""Weights that are pushed and never used.

verl-project/verl#7495: rollouts came from a frozen base model for two months, and nothing failed.
The same in other places: an adapter that the engine was never given (verl#3516, miles#2075,
unsloth#8701), experts that stayed in their first packed form (NovaSky-AI/SkyRL#1680), an adapter in
a layout that the engine's loader does not know (SkyRL#1852, refused at the first push). Losses stay
finite and rewards plausible, since the policy that samples is a good one.

Here the engine loads its first push and no other, in bfloat16 and at R1's learning rate: log-
probabilities then differ by no more than rounding, so that the probes notice nothing for long.
"""

import pytest

pytestmark = pytest.mark.more


def test_an_engine_that_loads_nothing_ends_the_run_at_the_push(replay):
    settings = ["--rollout.dtype", "bfloat16", "--optimizer.learning_rate", "1.0e-6"]
    ended = replay.run("undelivered", "are not what the engine computes with", *settings)
    assert ended.returncode == 1 and ended.seconds is not None, ended.printed
    assert "push 2: " in ended.printed and "model.embed_tokens.weight" in ended.printed
    # No step was sampled from the old weights, and none that was trained is lost silently.
    assert (ended.metrics, ended.checkpoints) == ([], [])
    assert not (ended.folder / "hf").exists()
