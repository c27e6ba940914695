"""Supervised fine-tuning: teach responses by example. Also what makes the laptop's base model."""

import itertools

import msgspec

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.processes.stopping import run_until_stopped
from megatron_r1.commands.parts import supervised_training
from megatron_r1.commands.parts.preloads import preload_megatron
from megatron_r1.commands.parts.supervised_training import SupervisedTask, resolve_steps
from megatron_r1.commands.parts.trainer_checks import check_trainer
from megatron_r1.config import Config
from megatron_r1.config.algorithms import find_rules
from megatron_r1.data.data_report import DataReport
from megatron_r1.data.mixture import MixtureSampler, describe_mixture, load_mixture
from megatron_r1.data.sampler import EpochSampler
from megatron_r1.data.sft import ExampleSampler, SFTExample, load_examples
from megatron_r1.data.sft_tokenizer import SFTTokenizer
from megatron_r1.models import read_hf_config
from megatron_r1.reporting.formatting import make_printable, shorten_middle
from megatron_r1.trainer.operations import SUPERVISED
from megatron_r1.trainer.training_sample import Sample

MAX_SHOWN_CHARS = 800
REQUIRED_KEYS = ("run.folder", "model.path", "sft.data")


def run(config: Config) -> None:
    """Train on `sft.data` for `run.steps` batches, or `sft.epochs`.

    Raises:
        UserError: a mistake in the recipe or its data, before any long work.
    """
    check_sft_settings(config)
    preload_megatron()
    text, examples, contents = read_examples(config)
    config = resolve_steps(config, "sft", examples.epoch_size)

    def to_samples(batch: list[SFTExample]) -> list[Sample]:
        return [make_sample(*text.encode(example)) for example in batch]

    task = SupervisedTask(config, examples, config.sft.batch_size, to_samples, SUPERVISED)
    run_until_stopped(supervised_training.train(task, "sft", [config.model.path, *contents]))


def dry_run(config: Config) -> None:
    """Read and render the examples, print what became of the rows, and train nothing. Errors as
    `run`."""
    check_sft_settings(config)
    text, examples, contents = read_examples(config)
    config = resolve_steps(config, "sft", examples.epoch_size)
    for line in contents:
        print(line)
    lengths = [
        len(text.encode(example)[0])
        for example in (examples.next(min(config.sft.batch_size, examples.epoch_size)))
    ]
    print(
        f"the first batch: {len(lengths):,} examples of {min(lengths):,} to {max(lengths):,} "
        f"tokens; {config.run.steps:,} batches of {config.sft.batch_size:,} in all\n"
        "nothing was trained or written"
    )


def make_sample(token_ids: list[int], is_learned: list[bool]) -> Sample:
    """Return a sample whose loss is that of the learned tokens. Tokens behind the last are left
    out: nothing depends on them."""
    first, end = is_learned.index(True), len(is_learned) - is_learned[::-1].index(True)
    learned_bytes = bytes(is_learned[first:end])
    sample = Sample.pack(token_ids[:first], token_ids[first:end])
    if 0 not in learned_bytes:
        return sample
    return msgspec.structs.replace(sample, is_sampled=learned_bytes)


def check_sft_settings(config: Config) -> None:
    """Raise UserError for settings and a model that cannot be trained."""
    config.model.require_language_head()
    check_trainer(config, "sft")
    if find_rules(config.rl.algorithm).critic:
        raise UserError(
            f"rl.algorithm: {config.rl.algorithm} has a critic, which sft would keep in memory and "
            "not train; leave rl.algorithm out",
            key="rl.algorithm",
            cause=Cause.CONFLICT,
        )
    read_hf_config(config.model.path)


def read_examples(config: Config) -> tuple[SFTTokenizer, EpochSampler[SFTExample], list[str]]:
    """Return the tokenizer with its template, the sampler of examples, and lines about these.
    Renders an example of each sequence of roles.

    Raises:
        UserError: the data cannot be read, or the template refuses an example.
    """
    text = SFTTokenizer(config.model.path, config.sft.template)
    sampler, lines = load_sampler(config)
    rendered = set()
    for example in sampler.items:
        roles = tuple(message["role"] for message in example.messages)
        if (form := (roles, example.first_loss_message, bool(example.tools))) not in rendered:
            rendered.add(form)
            text.encode(example)
    return text, sampler, [*lines, *mark_loss_tokens(sampler.items[0], text)]


def load_sampler(config: Config) -> tuple[EpochSampler[SFTExample], list[str]]:
    """Return the sampler of examples, and lines about its contents.

    Raises:
        UserError: the data cannot be read.
    """
    data, shuffled = config.sft.data, config.sft.order == "shuffled"
    if isinstance(data, str):
        report = DataReport(data)
        examples = ExampleSampler(load_examples(data, report=report), config.run.seed, shuffled)
        return examples, [f"{len(examples.items):,} examples", *report.lines()]
    parts = load_mixture(data)
    lines = [line for part in parts for line in part.report.lines()]
    return MixtureSampler(parts, config.run.seed, shuffled), [*describe_mixture(parts), *lines]


def mark_loss_tokens(example: SFTExample, text: SFTTokenizer) -> list[str]:
    """Return an example's text, with what is learned between « and »."""
    token_ids, is_learned = text.encode(example)
    pieces = []
    for learned, part in itertools.groupby(zip(is_learned, token_ids, strict=True), lambda p: p[0]):
        piece = text.decode([token for _, token in part])
        pieces.append(f"«{piece}»" if learned else piece)
    marked = make_printable(shorten_middle("".join(pieces), MAX_SHOWN_CHARS), True)
    return [
        f"  the first, {example.location}: {len(token_ids):,} tokens, the {sum(is_learned):,} "
        "between « and » are learned:",
        *(f"  | {line}" for line in marked.split("\n")),
    ]
