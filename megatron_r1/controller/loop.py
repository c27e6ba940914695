"""R1-Zero's algorithm (DeepSeek-R1, arXiv 2501.12948, section 2): sample groups, reward them,
reinforce the responses that are better than their group.

One pass of `train_policy` is one rollout: G responses to each of P prompts, their rewards and
advantages, log-probabilities under the old policy and the reference, one epoch of mini-batch
updates, and the new weights for the engines. `rl.algorithm` chooses how advantages and the loss are
computed (`controller.algorithms`). Placement, resuming and reporting are in `controller.rl_run` and
do not show here.

    megatron-r1 rl examples/laptop/r1_zero.yaml

goes through `commands/cli.py` and `commands/rl.py` to `train_policy`. From there the mathematics is
in these files, in the order in which `rl.algorithm: grpo` calls them:

 1. The reward of a response: the weighted sum of its terms, less a penalty of its length.
        r1_grading/terms/combined_reward.py         combine
        controller/corrections/overlong_penalty.py  overlong_penalty
 2. Its advantage within the group.
        controller/algorithms/grpo.py               advantages
        controller/advantages.py                    group_advantages
 3. Log-probabilities under π_old and π_ref.
        controller/policy_trainer.py                PolicyTrainer.compute_logprobs
        trainer/trainer.py                          Trainer.compute_logprobs
        trainer/loss_head.py                        LossHead.logprobs
        r1_kernels/linear_token_logprobs.py         linear_token_logprobs
 4. An update: forward and backward over the micro-batches of a mini-batch.
        controller/policy_trainer.py                PolicyTrainer.update_policy
        trainer/trainer.py                          Trainer.update
        trainer/passes.py                           optimizer_step
        trainer/passes.py                           run_passes
 5. The loss of a micro-batch, and the weight of a token in it: 1 / |o_i|.
        controller/algorithms/grpo.py               loss
        trainer/losses.py                           make_token_averaging
 6. Ratio, clip and KL of a token (formulae in `r1_kernels/policy_terms.py`; on a GPU Triton).
        trainer/loss_head.py                        LossHead.policy_loss
        r1_kernels/fused_policy_loss.py             linear_policy_loss_from_settings
        r1_kernels/primitives/policy_torch.py       policy_terms
 7. Normalization of the loss: Megatron-Core's `finalize_model_grads` divides the gradients, summed
    over micro-batches and ranks, by the sum of these denominators.
        trainer/losses.py                           loss_denominator
 8. The optimizer's step: `optimizer.step()`, Megatron-Core's, in `optimizer_step` of 4.
 9. The reference is replaced by the policy, when that is due.
        trainer/reference_policy.py                ReferencePolicy.refresh
10. The push of the new weights.
        controller/policy_engines.py                PolicyEngines.push
        controller/push/pusher.py                   WeightPusher.push
        controller/push/engine_links.py             EngineLinks.send
        push/sender.py                              WeightSender.send
        engines/plugin/backend.py                   PushTransferEngine.receive_weights

Algorithms that have them add a critic's values before 3 (`trainer/critic.py`), and an advantage per
token after it (`trainer/token_advantages.py`). Settings that correct any of them are in
`controller/corrections`."""

import asyncio
import random
from itertools import chain, islice, pairwise

from r1_grading.terms import weights_at

from megatron_r1.base.errors import RunError
from megatron_r1.config import Config
from megatron_r1.controller.algorithms import Algorithm
from megatron_r1.controller.corrections import reward_normalization
from megatron_r1.controller.corrections.overlong_penalty import overlong_penalty
from megatron_r1.controller.corrections.truncation_mask import mask_truncated
from megatron_r1.controller.policy_trainer import PolicyTrainer
from megatron_r1.controller.rl_run import RLRun
from megatron_r1.controller.rollouts.rollout import GradedResponse, Group
from megatron_r1.controller.rollouts.training_samples import training_samples
from megatron_r1.trainer.training_sample import Sample


async def train_policy(run: RLRun) -> None:
    """Train on one rollout after another until `run.steps`, or until asked to stop."""
    policy_trainer, engines = run.policy_trainer, run.engines
    while (config := run.next_step()) is not None:
        with run.phase("rollout"):
            rollout = await engines.rollout(run.step)
        groups, algorithm = rollout.groups, policy_trainer.algorithm
        advantages_by_group = outcome_advantages(groups, algorithm, config, run.step)
        # Not in the event loop: a rollout of 8,192 x 30,000 tokens is copied here.
        samples_by_response = await asyncio.to_thread(training_samples, groups, advantages_by_group)
        # By seed and step alone, so that a step that is repeated has the same mini-batches.
        random.Random(f"{config.run.seed}:{run.step}").shuffle(samples_by_response)

        with run.phase("train"):
            metrics = await policy_trainer.load(
                split_into_minibatches(samples_by_response, config.rl.minibatches)
            )
            await policy_trainer.compute_values()
            # Under π_ref, and under π_old where the first update does not compute them anyway.
            metrics |= await policy_trainer.compute_logprobs(config)
            await policy_trainer.compute_token_advantages(config)
            metrics |= await policy_trainer.mask_advantages(config)
        # No engine joins between two versions of the weights.
        async with engines.updating_weights():
            with run.phase("train"):
                updates = [
                    await update_networks(policy_trainer, config, minibatch_index, run.step)
                    for minibatch_index in range(config.rl.minibatches)
                ]
                metrics |= await policy_trainer.measure_logprob_diff()  # with π_old, known only now
                await policy_trainer.refresh_reference_if_due(config)
            with run.phase("push"):
                await engines.push(run.step)
        await run.finish_step(rollout, metrics, updates)


async def update_networks(
    policy_trainer: PolicyTrainer, config: Config, minibatch_index: int, step: int
) -> dict[str, float]:
    """Take one optimizer step on a mini-batch: the critic's, where there is one, and the
    policy's, once the critic is warm.

    Args:
        policy_trainer: runs the passes of the run's algorithm.
        config: the settings of this step.
        minibatch_index: number of the loaded mini-batch, from 0.
        step: the training step, from 1; the critic is warm after `critic.warmup_steps`.

    Returns:
        The metrics of the steps taken."""
    if not policy_trainer.algorithm.rules.critic:
        return await policy_trainer.update_policy(config, minibatch_index)
    metrics = await policy_trainer.update_critic(config, minibatch_index, step)
    if step > config.critic.warmup_steps:
        metrics |= await policy_trainer.update_policy(config, minibatch_index)
    return metrics


def outcome_advantages(
    groups: list[Group], algorithm: Algorithm, config: Config, step: int
) -> list[list[float]]:
    """Return the advantages of a rollout's responses by their outcome: those of all tokens of a
    response, or what `token_advantages` begin from.

    Args:
        groups: the graded responses.
        algorithm: maps their rewards to these.
        config: the settings of the step.
        step: its number, from 1.

    Returns:
        An advantage per response, a list per group; NaN: not trained on."""
    if config.rl.reward_normalization == "each":
        weights = weights_at(config.rewards.weights, step)
        values = reward_normalization.advantages(
            groups, algorithm.outcome_advantages, config, weights
        )
    else:
        rewards = [
            [training_reward(graded, config) for graded in group.responses] for group in groups
        ]
        values = algorithm.outcome_advantages(rewards, config.rl)
    if config.rl.truncated == "mask":
        values = mask_truncated(values, groups)
    return values


def training_reward(graded: GradedResponse, config: Config) -> float | None:
    """Return the reward that a response is trained on, with the penalty of its length if
    `rl.overlong_buffer` sets one; None where it could not be graded."""
    if not graded.is_graded:
        return None
    num_tokens, limit = len(graded.response.token_ids), config.rollout.max_response_tokens
    buffer, max_penalty = config.rl.overlong_buffer, config.rl.overlong_penalty
    return graded.reward + overlong_penalty(num_tokens, limit, buffer, max_penalty)


def split_into_minibatches(
    samples_by_response: list[list[Sample]], num_minibatches: int
) -> list[list[Sample]]:
    """Return the samples of mini-batches that have equally many responses each.

    The responses that are trained on are spread evenly over the mini-batches, in order.

    Args:
        samples_by_response: the samples of each response of the rollout.
        num_minibatches: a divisor of the number of responses.

    Raises:
        RunError: fewer responses are trained on than there are mini-batches: an update without any
            would move the weights all the same, by the optimizer's momentum.
    """
    trained_samples = [samples for samples in samples_by_response if samples[0].is_trained]
    untrained_samples = iter(
        [samples for samples in samples_by_response if not samples[0].is_trained]
    )
    if len(trained_samples) < num_minibatches:
        raise RunError(
            f"{len(trained_samples)} of {len(samples_by_response)} responses are trained on, too "
            f"few for rl.minibatches: {num_minibatches}; the others are ungraded, or cut off with "
            "rl.truncated: mask. Repair the reward or environment, whose reasons are in "
            "samples.jsonl, or raise rollout.max_response_tokens; the same command continues"
        )
    minibatch_size = len(samples_by_response) // num_minibatches
    bounds = [i * len(trained_samples) // num_minibatches for i in range(num_minibatches + 1)]
    minibatches = []
    for start, end in pairwise(bounds):
        minibatch = trained_samples[start:end]
        minibatch += islice(untrained_samples, minibatch_size - len(minibatch))
        minibatches.append(list(chain.from_iterable(minibatch)))
    return minibatches
