"""R1-Zero, as the paper has it: sample groups, grade them, push up what was better than its group.

One pass of `train` is one rollout: G outputs for each of P questions, their rewards and advantages,
old and reference log-probabilities, one inner epoch of mini-batch updates, new weights to the
engines. Placement, resuming and what a person sees are the session's business and do not show here.

    megatron-r1 rl examples/laptop/r1_zero.yaml
"""

from __future__ import annotations

import random

from megatron_r1.config import RLConfig
from megatron_r1.rl.advantages import group_advantages
from megatron_r1.rl.session import Session
from megatron_r1.rollout.sampling import Group
from megatron_r1.training.wire import Sample

LOSS = "megatron_r1.rl.grpo:grpo_loss"


async def train(session: Session) -> None:
    """Run rollouts until `run.steps`, or until the session is asked to stop."""
    rl = session.config.rl
    while session.next_step():
        with session.phase("rollout"):
            rollout = await session.rollout()
        samples = training_samples(rollout.groups, rl)
        random.Random(f"{session.config.run.seed}:{session.step}").shuffle(samples)

        with session.phase("train"):
            measured = await session.trainer.load(minibatches(samples, rl.minibatches))
            measured |= await session.score_old_and_reference()
            updates = [await session.update(i, LOSS) for i in range(rl.minibatches)]
            measured |= await session.engine_agreement()
            await session.refresh_reference_if_due()
        with session.phase("push"):
            await session.push_weights()
        await session.finish_step(rollout, measured, updates)


def training_samples(groups: list[Group], rl: RLConfig) -> list[Sample]:
    """Every output with its group-relative advantage, in the order of the groups.

    One that nobody could grade has none: it neither moves its group's mean nor is pushed itself.
    """
    samples = []
    for group in groups:
        advantages = group_advantages(
            [output.reward if output.is_graded else None for output in group.outputs],
            divide_by=rl.advantage_std,
            epsilon=rl.advantage_epsilon,
        )
        for output, advantage in zip(group.outputs, advantages, strict=True):
            made = output.completion
            sampled = (group.prompt_ids, made.token_ids, made.logprobs)
            samples.append(Sample.pack(*sampled, advantage, made.routing))
    return samples


def minibatches(samples: list[Sample], count: int) -> list[list[Sample]]:
    """Cut into `count` mini-batches of equal size, in order."""
    size = len(samples) // count
    return [samples[i * size : (i + 1) * size] for i in range(count)]
