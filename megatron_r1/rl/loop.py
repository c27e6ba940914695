"""R1-Zero, as the paper has it: sample groups, grade them, push up what was better than its group.

One pass of `train` is one rollout: G outputs for each of P questions, their rewards and advantages,
old and reference log-probabilities, one inner epoch of mini-batch updates, new weights to the
engines. Which estimator makes the advantages and the loss is `rl.algorithm`'s to say
(`rl.algorithms`). Placement, resuming and what a person sees are the session's business and do not
show here.

    megatron-r1 rl examples/laptop/r1_zero.yaml
"""

from __future__ import annotations

import random

from megatron_r1.config import Config
from megatron_r1.rl import algorithms
from megatron_r1.rl.algorithms import Algorithm
from megatron_r1.rl.overlong import overlong_punishment
from megatron_r1.rl.sampling import Group, Output
from megatron_r1.rl.session import Session
from megatron_r1.training.wire import Sample


async def train(session: Session) -> None:
    """Run rollouts until `run.steps`, or until the session is asked to stop."""
    rl = session.config.rl
    algorithm = algorithms.find(rl.algorithm)
    while session.next_step():
        with session.phase("rollout"):
            rollout = await session.rollout()
        samples = training_samples(rollout.groups, session.config)
        random.Random(f"{session.config.run.seed}:{session.step}").shuffle(samples)

        with session.phase("train"):
            measured = await session.trainer.load(minibatches(samples, rl.minibatches))
            measured |= await session.score(algorithm)
            measured |= await session.token_advantages(algorithm)
            updates = [await update(session, algorithm, i) for i in range(rl.minibatches)]
            measured |= await session.engine_agreement()
            await session.refresh_reference_if_due()
        with session.phase("push"):
            await session.push_weights()
        await session.finish_step(rollout, measured, updates)


async def update(session: Session, algorithm: Algorithm, index: int) -> dict[str, float]:
    """One optimizer step on mini-batch `index`: the critic's, where there is one, and the policy's,
    once the critic is warm."""
    if not algorithm.rules.critic:
        return await session.update(index, algorithm.loss)
    measured = await session.update_critic(index)
    if not session.is_warming_up:
        measured |= await session.update(index, algorithm.loss)
    return measured


def training_samples(groups: list[Group], config: Config) -> list[Sample]:
    """Every output with its advantage (for `token_advantages`, its reward), in the groups' order.

    One that nobody could grade has none: it neither moves its group's mean nor is pushed itself.
    """
    algorithm = algorithms.find(config.rl.algorithm)
    rewards = [[reward_of(output, config) for output in group.outputs] for group in groups]
    samples = []
    for group, advantages in zip(groups, algorithm.advantages(rewards, config.rl), strict=True):
        for output, advantage in zip(group.outputs, advantages, strict=True):
            made = output.completion
            sampled = (group.prompt_ids, made.token_ids, made.logprobs)
            taught = output.teacher_logprobs
            samples.append(Sample.pack(*sampled, advantage, made.routing, taught))
    return samples


def reward_of(output: Output, config: Config) -> float | None:
    """What an output is trained on: its reward and, if asked for, the punishment of its length;
    None where nobody could grade it."""
    if not output.is_graded:
        return None
    num_tokens, limit = len(output.completion.token_ids), config.rollout.max_response_tokens
    punishment = overlong_punishment(num_tokens, limit, config.rl.overlong_buffer)
    return output.reward + config.rl.overlong_penalty * punishment


def minibatches(samples: list[Sample], count: int) -> list[list[Sample]]:
    """Cut into `count` mini-batches of equal size, in order."""
    size = len(samples) // count
    return [samples[i * size : (i + 1) * size] for i in range(count)]
