"""A draft model that keeps the weights it was started with.

sgl-project/sglang#27718: pushes over NCCL update the model and never the MTP layer that drafts for
it. vllm-project/vllm#46725: so did all three ways to update vLLM; vllm-ascend#13209: acceptance
falls to 0%; sglang#31674: a rollout takes 25% longer than without drafts; radixark/miles#1926: each
push ran the drafter's post-processing on weights that it did not bring, acceptance fell from 2.71
tokens to 1.00. Nothing fails: what is sampled still has the policy's distribution.

Here MTP layers are trained during RL. The engine takes no pushes of them, or does not load them.
"""

import pytest

DRAFTING = ["--model.mtp", "train", "--rollout.speculative.method"]


@pytest.mark.more  # a start each
@pytest.mark.parametrize(
    ("fault", "sentence", "named"),
    [
        ("left_out_drafter", "the engine takes no pushes of", "model.layers.3."),
        ("kept_drafter", "are not what the engine computes with", "drafter.model.layers.3."),
    ],
)
def test_the_run_ends_by_the_names_of_the_drafters_tensors(replay, fault, sentence, named):
    ended = replay.run(fault, sentence, *DRAFTING, "mtp")
    assert ended.returncode == 1 and ended.seconds is not None, ended.printed
    line = next(line for line in ended.printed.splitlines() if sentence in line)
    assert named in line and "model.layers.2." not in line
    assert (ended.metrics, ended.checkpoints) == ([], [])


@pytest.mark.more
@pytest.mark.parametrize("method", ["mtp", "ngram"])
def test_without_a_fault_a_run_drafts_to_its_end(replay, method):
    # One of 1,000,000 tokens has experts that are so equally good that rounding chooses.
    ended = replay.run(None, "finished", *DRAFTING, method, "--rl.routing_replay", "true")
    assert ended.returncode == 0, ended.printed
    assert len(ended.metrics) == 4
    assert all(line["logprob_diff/max"] < 1e-4 for line in ended.metrics)
    # Of a random model's few drafts a step may accept none. Of 12 random tokens five hardly ever
    # repeat, so that ngram finds little to draft.
    accepted = [line["speculative/acceptance"] for line in ended.metrics if method == "mtp"]
    assert method == "ngram" or (max(accepted) < 1 and sum(accepted) > 0)
