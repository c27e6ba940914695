"""An algorithm outside the package that defines all it may; found on PYTHONPATH, as `grader` is.

Its metric `own` is 1 where the loss, on the trainer ranks, has the advantages computed there."""

from dataclasses import replace

from megatron_r1.config.algorithms import AlgorithmRules
from megatron_r1.controller.advantages import group_advantages

RULES = AlgorithmRules({"advantage_std": "none"}, kl_in_reward=True, advantage_stds=("none",))


def advantages(groups, rl):
    return [group_advantages(rewards, advantage_std="none") for rewards in groups]


def token_advantages(rollout, settings):
    from megatron_r1.trainer.rollout_batches import TokenTargets, reward_to_go

    made = reward_to_go(rollout, replace(settings, discount=0.5))
    for responses, whole in zip(rollout.responses, made, strict=True):
        responses.batch.logprobs["own"] = responses.local_part(whole)
    return TokenTargets(made)


def loss(batch, head, settings):
    from megatron_r1.controller.algorithms.grpo import loss as grpo_loss
    from megatron_r1.trainer.metrics import Mean

    terms = grpo_loss(batch, head, settings)
    is_own = batch.advantages == batch.logprobs["own"]
    own = Mean(is_own[batch.is_response].sum(), batch.is_response.sum())
    return terms._replace(metrics={**terms.metrics, "own": own})
