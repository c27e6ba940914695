"""Supervised fine-tuning: teach responses by example. Also what makes the laptop's base model."""

from __future__ import annotations

from megatron_r1.commands.epochs import with_steps
from megatron_r1.commands.launch import run_stage
from megatron_r1.commands.supervised_step import supervised_step
from megatron_r1.config import Config
from megatron_r1.config.algorithms import rules_of
from megatron_r1.data.mixture import MixtureSampler, describe, load_mixture
from megatron_r1.data.sampler import EpochSampler
from megatron_r1.data.sft import Example, ExampleSampler, load_examples
from megatron_r1.data.text import PromptText
from megatron_r1.models import read_hf_config
from megatron_r1.processes.stopping import StopRequest
from megatron_r1.supervision.supervisor import Supervisor
from megatron_r1.training.client import TrainerClient
from megatron_r1.training.recorder import Recorder
from megatron_r1.training.wire import Sample

LOSS = "megatron_r1.training.losses:supervised"
REQUIRED = ("run.folder", "model.path", "sft.data")


def run(config: Config) -> None:
    """Train on `sft.data` for `run.steps` batches, or `sft.epochs`. Raises ValueError before any
    long work."""
    config.model.require_language_head()
    if rules_of(config.rl.algorithm).critic:
        raise ValueError(
            f"rl.algorithm: {config.rl.algorithm} has a critic, which sft would keep in memory and "
            "not train; leave rl.algorithm out"
        )
    read_hf_config(config.model.path)
    text = PromptText(config.model.path, "{problem}")
    examples, contents = _examples(config)
    config = with_steps(config, "sft", examples.epoch_size)
    facts = [config.model.path, *contents]

    start = examples.state_dict()

    async def body(
        recorder: Recorder, trainer: TrainerClient, stop: StopRequest, supervisor: Supervisor
    ) -> None:
        recorder.view.phase("starting trainer")
        await trainer.connect()
        recorder.view.message(f"{trainer.num_parameters / 1e6:,.2f}M parameters")

        async def attempt() -> None:
            if recorder.resumed:
                await recorder.load(trainer, reference=False)
            examples.load_state_dict(recorder.state.sampler or start)
            await _train(config, recorder, trainer, text, examples, stop)

        await supervisor.with_restarts(attempt)

    run_stage(config, "sft", facts, body)


def _examples(config: Config) -> tuple[EpochSampler[Example], list[str]]:
    """What is drawn from, and what is in it, for the log."""
    data, shuffled = config.sft.data, config.sft.order == "shuffled"
    if isinstance(data, str):
        examples = ExampleSampler(load_examples(data), config.run.seed, shuffled)
        return examples, [f"{len(examples.items):,} examples"]
    ingredients = load_mixture(data)
    return MixtureSampler(ingredients, config.run.seed, shuffled), describe(ingredients)


async def _train(
    config: Config,
    recorder: Recorder,
    trainer: TrainerClient,
    text: PromptText,
    examples: EpochSampler,
    stop: StopRequest,
) -> None:
    state = recorder.state
    recorder.view.phase("train")
    while state.step < config.run.steps:
        batch = [
            Sample.pack(text.encode(e.prompt), text.encode_response(e.response))
            for e in examples.next(config.sft.batch_size)
        ]
        await supervised_step(config, recorder, trainer, examples, batch, LOSS)
        last = state.step == config.run.steps
        stopping = stop.requested
        if last or stopping or state.step % config.checkpoint.every == 0:
            await recorder.save(trainer)
        if stopping:
            return
