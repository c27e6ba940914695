"""Supervised fine-tuning: teach responses by example. Also what makes the laptop's base model."""

from megatron_r1.commands import early_imports
from megatron_r1.commands.supervised import SupervisedTask, run_supervised, with_steps
from megatron_r1.commands.training_run import check_trainer
from megatron_r1.config import Config
from megatron_r1.config.algorithms import rules_of
from megatron_r1.data.mixture import MixtureSampler, describe, load_mixture
from megatron_r1.data.sampler import EpochSampler
from megatron_r1.data.sft import ExampleSampler, SftExample, load_examples
from megatron_r1.data.text import PromptText
from megatron_r1.errors import Cause, UserError
from megatron_r1.models import read_hf_config
from megatron_r1.training.sample import Sample
from megatron_r1.training.wire import SUPERVISED

REQUIRED = ("run.folder", "model.path", "sft.data")


def run(config: Config) -> None:
    """Train on `sft.data` for `run.steps` batches, or `sft.epochs`. Raises UserError before any
    long work."""
    config.model.require_language_head()
    check_trainer(config, "sft")
    early_imports.begin_trainer()
    if rules_of(config.rl.algorithm).critic:
        raise UserError(
            f"rl.algorithm: {config.rl.algorithm} has a critic, which sft would keep in memory and "
            "not train; leave rl.algorithm out",
            key="rl.algorithm",
            cause=Cause.CONFLICT,
        )
    read_hf_config(config.model.path)
    text = PromptText(config.model.path, "{problem}")
    examples, contents = _examples(config)
    config = with_steps(config, "sft", examples.epoch_size)

    def to_samples(batch: list[SftExample]) -> list[Sample]:
        return [
            Sample.pack(text.encode(example.prompt), text.encode_response(example.response))
            for example in batch
        ]

    task = SupervisedTask(config, examples, config.sft.batch_size, to_samples, SUPERVISED)
    run_supervised(task, "sft", [config.model.path, *contents])


def _examples(config: Config) -> tuple[EpochSampler[SftExample], list[str]]:
    """Return the sampler of examples, and lines about its contents."""
    data, shuffled = config.sft.data, config.sft.order == "shuffled"
    if isinstance(data, str):
        examples = ExampleSampler(load_examples(data), config.run.seed, shuffled)
        return examples, [f"{len(examples.items):,} examples"]
    parts = load_mixture(data)
    return MixtureSampler(parts, config.run.seed, shuffled), describe(parts)
