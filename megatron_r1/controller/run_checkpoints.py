"""Saves what an RL run continues from, the states of its sampler and reward workers included."""

from __future__ import annotations

from collections import Counter
from typing import Any

from r1_grading.pool import LEVELS

from megatron_r1.controller.rollouts.step_sampler import StepSampler
from megatron_r1.controller.run_recorder import RunRecorder
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.trainer.checkpoints.checkpoint_folders import checkpoint_step, complete_checkpoints
from megatron_r1.trainer.operations import ModelOperations


class RunCheckpoints:
    """Saves and restores what a run keeps across restarts, in checkpoints and in the sample log:
    the trainer's state, the position in the prompts, and the counts of rewards.

    `resume` comes first.

    Args:
        recorder: has the run's folder, its state and its series of checkpoints.
        trainer: saves and loads what its ranks hold.
        step_sampler: has the position in the prompts, and the sample log."""

    def __init__(self, recorder: RunRecorder, trainer: TrainerClient, step_sampler: StepSampler):
        self.recorder, self.trainer, self.step_sampler = recorder, trainer, step_sampler
        self._rewards_before: Counter[str] = Counter()

    async def resume(self, uses_reference: bool) -> None:
        """Load the newest checkpoint into the trainer, and its state into the prompt sampler;
        without one, keep the first policy as the reference, where the run has one."""
        state, view = self.recorder.state, self.recorder.view
        if self.recorder.is_resumed:
            view.show_phase("loading checkpoint")
            await self.recorder.load(self.trainer, with_reference=uses_reference)
            counts = ", ".join(f"{n:,} {name}" for name, n in state.rewards.items() if n) or "none"
            view.show_message(f"calls of rewards so far, one for each response and term: {counts}")
            self.step_sampler.prompt_sampler.load_state_dict(state.sampler_state)
        elif uses_reference:
            await self.trainer.call(ModelOperations.refresh_reference)
        # The pool may be older than this `RLRun`: its counts until now are not of this one.
        self._rewards_before = Counter(state.rewards)
        self._rewards_before.subtract(self._num_rewards())

    async def save(self, step: int, sampler_state: dict[str, Any]) -> None:
        """Start a checkpoint after `step`.

        Args:
            step: the newest finished step.
            sampler_state: the position in the prompts after that step."""
        state = self.recorder.state
        state.step, state.sampler_state = step, sampler_state
        state.rewards = dict(self._rewards_before + Counter(self._num_rewards()))
        await self.recorder.save(self.trainer)

    async def prune_samples(self, keep: int) -> None:
        """Delete the samples of steps before the newest checkpoints, which are not repeated.

        Args:
            keep: how many of the newest checkpoints count."""
        newest_checkpoints = complete_checkpoints(self.recorder.folder.checkpoints)[-keep:]
        if self.step_sampler.sample_log and newest_checkpoints:
            await self.step_sampler.sample_log.prune(checkpoint_step(newest_checkpoints[0]))

    def _num_rewards(self) -> dict[str, int]:
        snapshot = self.step_sampler.collector.pool.snapshot()
        return {name: n for name, n in snapshot.items() if name not in LEVELS}
