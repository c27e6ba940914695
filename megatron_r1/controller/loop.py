"""R1-Zero's algorithm (DeepSeek-R1, arXiv 2501.12948, section 2): sample groups, reward them,
reinforce the responses that are better than their group.

One pass of `train` is one rollout: G responses to each of P prompts, their rewards and advantages,
log-probabilities under the old policy and the reference, one epoch of mini-batch updates, and the
new weights for the engines. `rl.algorithm` chooses the estimator of advantages and the loss
(`controller.algorithms`). Placement, resuming and reporting are in `controller.session` and do not
show here.

    megatron-r1 rl examples/laptop/r1_zero.yaml

An update goes from `passes.update_policy` to `trainer.trainer.Trainer.update`, the loss of the
algorithm (`controller.algorithms.grpo.loss`), and `r1_kernels.linear_policy_loss`."""

import asyncio
import random
from itertools import chain, islice

from megatron_r1.base.errors import RunError
from megatron_r1.config import Config
from megatron_r1.controller.advantages import overlong_punishment
from megatron_r1.controller.rollouts.rollout import GradedResponse, training_samples
from megatron_r1.controller.session import Session
from megatron_r1.controller.trainer_passes import TrainerPasses
from megatron_r1.trainer.training_sample import Sample


async def train(session: Session) -> None:
    """Train on one rollout after another until `run.steps`, or until asked to stop."""
    passes, engines = session.passes, session.engines
    while (config := session.next_step()) is not None:
        with session.phase("rollout"):
            rollout = await engines.rollout(session.step)
        rewards = [
            [training_reward(each, config) for each in group.responses] for group in rollout.groups
        ]
        advantages = passes.algorithm.advantages(rewards, config.rl)
        # Not in the event loop: a rollout of 8,192 x 30,000 tokens is copied here.
        samples_by_response = await asyncio.to_thread(training_samples, rollout.groups, advantages)
        # By seed and step alone, so that a step that is repeated has the same mini-batches.
        random.Random(f"{config.run.seed}:{session.step}").shuffle(samples_by_response)

        with session.phase("train"):
            metrics = await passes.load(minibatches(samples_by_response, config.rl.minibatches))
            await passes.compute_values()
            # Under π_ref, and under π_old where the first update does not compute them anyway.
            metrics |= await passes.compute_logprobs(config)
            await passes.compute_token_advantages(config)
        async with engines.updating():  # no engine joins between two versions of the weights
            with session.phase("train"):
                updates = [
                    await update(passes, config, index, session.step)
                    for index in range(config.rl.minibatches)
                ]
                metrics |= await passes.compare_with_engines()  # with π_old, known only now
                await passes.refresh_reference_if_due(config)
            with session.phase("push"):
                await engines.push(session.step)
        await session.finish_step(rollout, metrics, updates)


async def update(passes: TrainerPasses, config: Config, index: int, step: int) -> dict[str, float]:
    """Take one optimizer step on mini-batch `index`: the critic's, where there is one, and the
    policy's, once the critic is warm."""
    if not passes.algorithm.rules.critic:
        return await passes.update_policy(config, index)
    metrics = await passes.update_critic(config, index, step)
    if step > config.critic.warmup_steps:
        metrics |= await passes.update_policy(config, index)
    return metrics


def training_reward(graded: GradedResponse, config: Config) -> float | None:
    """Return the reward that a response is trained on, with the punishment of its length if
    `rl.overlong_buffer` sets one; None where it could not be graded."""
    if not graded.is_graded:
        return None
    num_tokens, limit = len(graded.response.token_ids), config.rollout.max_response_tokens
    punishment = overlong_punishment(num_tokens, limit, config.rl.overlong_buffer)
    return graded.reward + config.rl.overlong_penalty * punishment


def minibatches(samples_by_response: list[list[Sample]], count: int) -> list[list[Sample]]:
    """Return the samples of `count` mini-batches with equally many responses each, in order.

    Those that are trained on are spread evenly over the mini-batches. Raises RunError where there
    are fewer than mini-batches: an update without any would move the weights all the same, by the
    optimizer's momentum."""
    trained = [samples for samples in samples_by_response if samples[0].is_trained]
    others = iter([samples for samples in samples_by_response if not samples[0].is_trained])
    if len(trained) < count:
        raise RunError(
            f"{len(trained)} of {len(samples_by_response)} responses are graded, too few for "
            f"rl.minibatches: {count}. Repair the reward or environment, whose reasons are in "
            "samples.jsonl; the same command continues"
        )
    size, made = len(samples_by_response) // count, []
    for i in range(count):
        own = trained[i * len(trained) // count : (i + 1) * len(trained) // count]
        own += islice(others, size - len(own))
        made.append(list(chain.from_iterable(own)))
    return made
