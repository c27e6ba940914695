"""Reward models: DeepSeek-R1's helpful (pairs, Bradley-Terry) and safety (labels, cross entropy).

Sources: arXiv 2501.12948 v2, section 3.1 and supplement B.3; docs/reward_models.md."""

import hashlib
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.base.processes.stopping import run_until_stopped
from megatron_r1.commands.parts import supervised_training
from megatron_r1.commands.parts.preloads import preload_megatron
from megatron_r1.commands.parts.supervised_training import SupervisedTask, resolve_steps
from megatron_r1.commands.parts.trainer_checks import check_trainer
from megatron_r1.config import Config
from megatron_r1.config.yaml_text import format_value
from megatron_r1.controller.run_recorder import RunRecorder
from megatron_r1.controller.trainer_calls.client import TrainerClient
from megatron_r1.data.preference_tokenizer import PreferenceTokenizer
from megatron_r1.data.preferences import Preference, read_preferences
from megatron_r1.data.prompt import is_heldout, normalize_question
from megatron_r1.data.sampler import EpochSampler
from megatron_r1.evaluation.score_reliability import label_measures, pair_measures
from megatron_r1.models import read_hf_config
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.trainer.training_sample import Sample

REQUIRED_KEYS = ("run.folder", "model.path", "reward_model.data")
IMPLIED_SETTINGS = {"model.head": "score"}
SPLIT_SALT = "a reward model's "
"""Makes the split into training and held-out questions independent of a policy's: rows that are all
a policy's training questions would leave nothing held out."""
EVALUATION_BATCH_ROWS = 1024
"""Rows whose tokens the trainer holds at a time during an evaluation."""


@dataclass(frozen=True)
class RewardModelRow:
    """A tokenized row: both texts of a pair, the chosen one first, or one text with its label."""

    question: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class RewardModelData:
    """The training and held-out rows of a reward model.

    Attributes:
        train: the rows to train on.
        heldout: the rows of held-out questions.
        dropped_rows: how many rows were left out, by reason."""

    train: list[RewardModelRow]
    heldout: list[RewardModelRow]
    dropped_rows: Counter[str]


class RowSampler(EpochSampler[RewardModelRow]):
    """Draws rows in shuffled epochs; a state is refused after a token or label has changed."""

    def key(self, item: RewardModelRow) -> str:
        """Return a digest of the row's tokens and labels."""
        digest = hashlib.sha256()
        for sample in item.samples:
            digest.update(sample.token_ids + b"%f" % sample.label)
        return digest.hexdigest()


def run(config: Config) -> None:
    """Train on `reward_model.data` for `run.steps` batches, or `reward_model.epochs`.

    Raises:
        UserError: a mistake in the recipe or its data, before any long work.
    """
    settings = config.reward_model
    if config.model.head != "score":
        raise UserError(
            f"model.head: {config.model.head} has no score to train; set it to score",
            key="model.head",
            cause=Cause.CONFLICT,
        )
    check_trainer(config, "reward-model")
    preload_megatron()
    hf_config = read_hf_config(config.model.path, "score")
    text = PreferenceTokenizer(
        config.model.path, settings.template, settings.scored_part, settings.max_chars
    )
    rows = load_rows(config, text, hf_config)
    config = resolve_steps(config, "reward_model", len(rows.train))

    def notes(trainer: TrainerClient, is_resumed: bool) -> list[str]:
        lines = [
            f"{count:,} rows left out: {reason}" for reason, count in rows.dropped_rows.items()
        ]
        if any(rank["has_new_score_head"] for rank in trainer.ranks) and not is_resumed:
            lines.append("the score head is new: drawn with std 1 / sqrt(hidden_size + 1)")
        return lines

    async def evaluate(recorder: RunRecorder, trainer: TrainerClient) -> None:
        if rows.heldout:
            await _evaluate_heldout(config, recorder, trainer, rows.heldout)

    sampler = RowSampler(rows.train, config.run.seed)
    loss, size = f"megatron_r1.trainer.reward_losses:{settings.kind}", len(rows.train[0].samples)
    task = SupervisedTask(
        config, sampler, settings.batch_size, _row_samples, loss, size, notes, evaluate
    )
    unit = "pairs" if settings.kind == "pairwise" else "labelled responses"
    facts = [config.model.path, f"{len(rows.train):,} {unit}, {len(rows.heldout):,} held out"]
    run_until_stopped(
        supervised_training.train(task, "reward model", facts, _next_commands(config))
    )


def load_rows(config: Config, text: PreferenceTokenizer, hf_config: HFConfig) -> RewardModelData:
    """Read the rows of `reward_model.data`, tokenize them and split them by their questions.

    Args:
        config: the recipe.
        text: renders what is scored of a response, and tokenizes it.
        hf_config: the model's config.json, whose positions limit a text.

    Raises:
        UserError: a bad row, with file and line; texts that end with the padding token; or a side
            has no rows."""
    settings = config.reward_model
    limit = settings.max_tokens or hf_config["max_position_embeddings"]
    sides: dict[bool, list[RewardModelRow]] = {False: [], True: []}
    dropped_rows: Counter[str] = Counter()
    for row in read_preferences(settings.data, settings.kind):
        samples = _tokenize_responses(row, text, hf_config)
        if len(samples) < len(row.responses):
            dropped_rows[f"a response has no {settings.scored_part} to score"] += 1
        elif max(map(len, samples)) > limit:
            dropped_rows[f"a text is longer than {limit:,} tokens"] += 1
        elif len({sample.token_ids for sample in samples}) < len(samples):
            dropped_rows[f"both responses have the same {settings.scored_part}"] += 1
        else:
            heldout = is_heldout(row.question, settings.heldout_fraction, SPLIT_SALT)
            sides[heldout].append(RewardModelRow(normalize_question(row.question), samples))
    if not sides[False] or (settings.heldout_fraction and not sides[True]):
        side = "held-out" if sides[False] else "training"
        reasons = "".join(
            f"; {count:,} left out: {reason}" for reason, count in dropped_rows.items()
        )
        raise UserError(
            f"{settings.data}: no {side} row{reasons}; give more rows or change "
            f"reward_model.heldout_fraction={settings.heldout_fraction:g}",
            key="reward_model.data",
            cause=Cause.EMPTY,
        )
    return RewardModelData(sides[False], sides[True], dropped_rows)


def _tokenize_responses(
    row: Preference, text: PreferenceTokenizer, hf_config: HFConfig
) -> tuple[Sample, ...]:
    """Return a sample for each response of `row` that has a part to score."""
    samples = []
    for response, label in zip(row.responses, row.labels, strict=True):
        tokens = text.encode(row.question, response, row.thought_opened)
        if tokens and tokens[-1] == hf_config.get("pad_token_id"):
            raise UserError(
                f"{row.location}: the text ends with {text.decode(tokens[-1:])!r}, config.json's "
                "pad_token_id: transformers would read the score before it, vLLM behind it; end "
                "reward_model.template with another token, or give config.json another "
                "pad_token_id",
                key="reward_model.template",
                cause=Cause.CONFLICT,
            )
        if tokens:
            samples.append(Sample.pack(tokens, [], label=label))
    return tuple(samples)


def _row_samples(rows: Sequence[RewardModelRow]) -> list[Sample]:
    return list(chain.from_iterable(row.samples for row in rows))


async def _evaluate_heldout(
    config: Config, recorder: RunRecorder, trainer: TrainerClient, heldout: list[RewardModelRow]
) -> None:
    """Score the held-out rows and record how reliable the scores are.

    Args:
        config: the recipe.
        recorder: records the result.
        trainer: the trainer, with the model.
        heldout: the rows that are not trained on."""
    recorder.view.show_phase("evaluation", f"{len(heldout):,} held-out rows")
    scores: list[float] = []
    for first in range(0, len(heldout), EVALUATION_BATCH_ROWS):
        samples = _row_samples(heldout[first : first + EVALUATION_BATCH_ROWS])
        # Every data-parallel rank needs a sample: too few are sent several times.
        await trainer.load([samples * -(-trainer.data_parallel_size // len(samples))])
        scores += (await trainer.sample_scores())[0][: len(samples)]
    questions = [row.question for row in heldout]
    if config.reward_model.kind == "pairwise":
        measures = pair_measures(questions, scores[0::2], scores[1::2])
    else:
        labels = [row.samples[0].label for row in heldout]
        measures = label_measures(questions, scores, labels)
    recorder.record_evaluation({"step": recorder.state.step, **measures}, [])


def _next_commands(config: Config) -> list[tuple[str, str]]:
    folder, name = config.run.folder, config.reward_model.kind
    kind = "helpful" if config.reward_model.scored_part == "summary" else "safety"
    options = {"url": "http://127.0.0.1:8000", "model": f"{name}-rm"}
    if config.reward_model.template is not None:
        options["template"] = config.reward_model.template
    use = ["megatron-r1", "rl", "RECIPE.yaml", f"--rewards.options.{kind}", format_value(options)]
    return [
        (
            "serve it",
            f"python -m vllm.entrypoints.openai.api_server --model {folder}/hf --runner pooling "
            f"--served-model-name {name}-rm --port 8000",
        ),
        ("use it as a reward", shlex.join(use)),
    ]
