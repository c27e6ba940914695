"""Training over a data set of examples: the loop of `sft` and `reward-model`, which say what their
data set, loss and evaluation are."""

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from megatron_r1.base.errors import Cause, TrainerLost, UserError
from megatron_r1.base.processes.stopping import StopRequest
from megatron_r1.commands.parts.training_run import Commands, show_trainer, training_run
from megatron_r1.config import Config
from megatron_r1.config.optimizer import learning_rate
from megatron_r1.controller.run_recorder import RunRecorder
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.data.sampler import EpochSampler
from megatron_r1.trainer.training_sample import Sample

Item = TypeVar("Item")


@dataclass(frozen=True)
class SupervisedTask(Generic[Item]):
    """A data set, its loss and its evaluation.

    Attributes:
        config: the recipe.
        sampler: draws the items of each batch.
        batch_size: items per optimizer step.
        to_samples: tokenizes the items of a batch.
        loss: as "module:function".
        samples_per_unit: number of consecutive samples that stay in one micro-batch.
        notes: messages about the data and the model, once the trainer has started.
        evaluate: called before the first step, every `eval.every` steps, and after the last."""

    config: Config
    sampler: EpochSampler[Item]
    batch_size: int
    to_samples: Callable[[list[Item]], list[Sample]]
    loss: str
    samples_per_unit: int = 1
    notes: Callable[[TrainerClient, bool], Sequence[str]] = lambda trainer, resumed: ()
    evaluate: Callable[[RunRecorder, TrainerClient], Awaitable[None]] | None = None


def resolve_steps(
    config: Config, section: Literal["sft", "reward_model"], epoch_size: int
) -> Config:
    """Return the configuration with the `run.steps` that the section's `epochs` amounts to; the
    last batch may begin another epoch.

    Args:
        config: the recipe.
        section: the section whose `epochs` and `batch_size` count.
        epoch_size: items of an epoch.

    Raises:
        UserError: the recipe sets another number."""
    settings = getattr(config, section)
    if settings.epochs is None:
        return config
    # The rounding: 0.1 x 30 must not become 4 batches of one.
    num_examples = round(settings.epochs * epoch_size, 6)
    steps = max(1, math.ceil(num_examples / settings.batch_size))
    if "steps" in config.run.model_fields_set and config.run.steps != steps:
        raise UserError(
            f"{section}.epochs: {settings.epochs:g} epochs of {epoch_size:,} examples are "
            f"{steps:,} batches, and run.steps is {config.run.steps:,}; leave one of them out",
            key=f"{section}.epochs",
            cause=Cause.CONFLICT,
        )
    return config.with_changes(run={"steps": steps})


async def train(
    task: SupervisedTask[Item], title: str, facts: Sequence[str], next_commands: Commands = ()
) -> None:
    """Train for `run.steps` batches; after the loss of trainer ranks again, from the newest
    checkpoint.

    Args:
        task: the recipe, and the sampler of its batches.
        title: the kind of run, for its title.
        facts: short phrases that describe the run in the terminal and in its report.
        next_commands: pairs of a purpose and a command to try next, which the report lists.

    Raises:
        UserError: a setting, file or model cannot be used.
        TrainerError: the trainer ranks failed for good.
        HangError: nothing moved for `run.hang_seconds`.
        KeyboardInterrupt: the run was asked to stop before its last step.
    """
    start = task.sampler.state_dict()
    async with training_run(task.config, title, facts, next_commands) as training:
        if training is None:
            return
        recorder, trainer = training.recorder, training.trainer
        recorder.view.show_phase("starting trainer")
        await trainer.connect()
        show_trainer(recorder, trainer)
        for note in task.notes(trainer, recorder.is_resumed):
            recorder.view.show_message(note)
        while True:
            try:
                if recorder.is_resumed:
                    await recorder.load(trainer, with_reference=False)
                task.sampler.load_state_dict(recorder.state.sampler_state or start)
                return await _take_steps(task, recorder, trainer, training.stop)
            except TrainerLost as lost:
                await training.supervisor.restart_trainer(lost)


async def _take_steps(
    task: SupervisedTask[Item], recorder: RunRecorder, trainer: TrainerClient, stop: StopRequest
) -> None:
    """Take the steps that are left, or those until a stop is requested."""
    state, steps = recorder.state, task.config.run.steps
    evaluation, checkpoint = task.config.eval, task.config.checkpoint
    if task.evaluate and not recorder.is_resumed:
        await task.evaluate(recorder, trainer)
    while state.step < steps:
        recorder.view.show_phase("train")
        await _take_step(task, recorder, trainer)
        is_last, is_stopping = state.step == steps, stop.is_requested
        is_due = evaluation.every and state.step % evaluation.every == 0
        if task.evaluate and (is_last or is_due):
            await task.evaluate(recorder, trainer)
        if is_last or is_stopping or state.step % checkpoint.every == 0:
            await recorder.save(trainer)
        if is_stopping:
            return


async def _take_step(
    task: SupervisedTask[Item], recorder: RunRecorder, trainer: TrainerClient
) -> None:
    """Take one optimizer step on the next batch, and record it."""
    state, config = recorder.state, task.config
    batch = task.to_samples(task.sampler.next(task.batch_size))
    start = time.perf_counter()
    state.step += 1
    state.optimizer_step += 1
    rate = learning_rate(config.optimizer, state.step, config.run.steps)
    metrics = await trainer.load([batch], samples_per_unit=task.samples_per_unit)
    metrics |= await trainer.update(0, task.loss, None, rate)
    seconds = time.perf_counter() - start
    metrics["trainer/restarts"] = trainer.num_restarts
    metrics |= await recorder.checkpoints.completed_metrics(trainer)
    metrics |= {
        "learning_rate": rate,
        "time/train": seconds,
        "time/step": seconds,
        "tokens_per_second": sum(len(sample) for sample in batch) / seconds,
    }
    recorder.record_step({"step": state.step, **metrics}, [])
    state.sampler_state = task.sampler.state_dict()
