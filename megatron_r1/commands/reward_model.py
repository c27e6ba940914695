"""Reward models: DeepSeek-R1's helpful (pairs, Bradley-Terry) and safety (labels, cross entropy).

Sources: arXiv 2501.12948 v2, section 3.1 and supplement B.3; docs/reward_models.md.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from itertools import chain

from megatron_r1.commands.epochs import with_steps
from megatron_r1.commands.launch import run_stage
from megatron_r1.commands.supervised_step import supervised_step
from megatron_r1.config import Config
from megatron_r1.data.preferences import Preference, read_preferences
from megatron_r1.data.prompts import is_heldout, normalize
from megatron_r1.data.sampler import EpochSampler
from megatron_r1.data.scored_text import ScoredText
from megatron_r1.evaluation.reliability import label_measures, pair_measures
from megatron_r1.models import read_hf_config
from megatron_r1.processes.stopping import StopRequest
from megatron_r1.supervision.supervisor import Supervisor
from megatron_r1.training.client import TrainerClient
from megatron_r1.training.recorder import Recorder
from megatron_r1.training.wire import Sample

REQUIRED = ("run.folder", "model.path", "reward_model.data")
IMPLIED = {"model.head": "score"}
EVALUATED_AT_ONCE = 1024
"""Rows whose tokens the trainer holds during an evaluation."""


@dataclass(frozen=True)
class Row:
    """A row as the trainer sees it: both texts of a pair, chosen first, or one with its label."""

    question: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Rows:
    """dropped: why rows were left out, and how many."""

    train: list[Row]
    heldout: list[Row]
    dropped: Counter[str]


class RowSampler(EpochSampler[Row]):
    """Draws rows in shuffled epochs; a state is refused where a token or label has changed."""

    def __init__(self, rows: list[Row], seed: int) -> None:
        super().__init__(rows, seed, _fingerprint)


def run(config: Config) -> None:
    """Train on `reward_model.data` for `run.steps` batches, or `reward_model.epochs`. Raises
    ValueError before any long work."""
    settings = config.reward_model
    if config.model.head != "score":
        raise ValueError(f"model.head: {config.model.head} has no score to train; set it to score")
    hf = read_hf_config(config.model.path, "score")
    text = ScoredText(config.model.path, settings.template, settings.shown, settings.max_chars)
    rows = load_rows(config, text, hf)
    config = with_steps(config, "reward_model", len(rows.train))
    sampler = RowSampler(rows.train, config.run.seed)
    start = sampler.state_dict()
    unit = "pairs" if settings.kind == "pairwise" else "labelled responses"
    facts = [config.model.path, f"{len(rows.train):,} {unit}, {len(rows.heldout):,} held out"]

    async def body(
        recorder: Recorder, trainer: TrainerClient, stop: StopRequest, supervisor: Supervisor
    ) -> None:
        for reason, count in rows.dropped.items():
            recorder.view.message(f"{count:,} rows left out: {reason}")
        recorder.view.phase("starting trainer")
        await trainer.connect()
        recorder.view.message(f"{trainer.num_parameters / 1e6:,.2f}M parameters")
        if any(place["score_is_new"] for place in trainer.ranks) and not recorder.resumed:
            recorder.view.message("the score head is new: drawn with std 1 / sqrt(hidden_size + 1)")

        async def attempt() -> None:
            if recorder.resumed:
                await recorder.load(trainer, reference=False)
            sampler.load_state_dict(recorder.state.sampler or start)
            await _train(config, recorder, trainer, sampler, rows.heldout, stop)

        await supervisor.with_restarts(attempt)

    run_stage(config, "reward model", facts, body, _next_commands(config))


def load_rows(config: Config, text: ScoredText, hf: dict) -> Rows:
    """The rows of `reward_model.data`, tokenized and split by their questions.

    Raises ValueError with file and line for a bad row, for texts that end with the padding token,
    and where too few are left on either side.
    """
    settings = config.reward_model
    limit = settings.max_tokens or hf["max_position_embeddings"]
    found: dict[bool, list[Row]] = {False: [], True: []}
    dropped: Counter[str] = Counter()
    for row in read_preferences(settings.data, settings.kind):
        samples = _samples(row, text, hf)
        if None in samples:
            dropped[f"a response has no {settings.shown} to score"] += 1
        elif max(map(len, samples)) > limit:
            dropped[f"a text is longer than {limit:,} tokens"] += 1
        elif len({sample.token_ids for sample in samples}) < len(samples):
            dropped[f"both responses have the same {settings.shown}"] += 1
        else:
            # Of answers to a policy's training questions its own share would be empty.
            side = is_heldout(row.question, settings.heldout_fraction, "a reward model's ")
            found[side].append(Row(normalize(row.question), tuple(samples)))
    if not found[False] or (settings.heldout_fraction and not found[True]):
        side = "held-out" if found[False] else "training"
        why = "".join(f"; {count:,} left out: {reason}" for reason, count in dropped.items())
        raise ValueError(
            f"{settings.data}: no {side} row{why}; give more rows or change "
            f"reward_model.heldout_fraction={settings.heldout_fraction:g}"
        )
    return Rows(found[False], found[True], dropped)


def _samples(row: Preference, text: ScoredText, hf: dict) -> list[Sample | None]:
    samples = []
    for response, label in zip(row.responses, row.labels, strict=True):
        tokens = text.encode(row.question, response, row.opened)
        if tokens and tokens[-1] == hf.get("pad_token_id"):
            raise ValueError(
                f"{row.location}: the text ends with {text.decode(tokens[-1:])!r}, config.json's "
                "pad_token_id: transformers would read the score before it, vLLM behind it; end "
                "reward_model.template with another token, or give config.json another pad_token_id"
            )
        samples.append(Sample.pack(tokens, [], label=label) if tokens else None)
    return samples


async def _train(
    config: Config,
    recorder: Recorder,
    trainer: TrainerClient,
    sampler: RowSampler,
    heldout: list[Row],
    stop: StopRequest,
) -> None:
    state, settings = recorder.state, config.reward_model
    loss = f"megatron_r1.training.scores:{settings.kind}"
    if not recorder.resumed:
        await _evaluate(config, recorder, trainer, heldout)
    while state.step < config.run.steps:
        recorder.view.phase("train")
        rows = sampler.next(settings.batch_size)
        batch = list(chain.from_iterable(row.samples for row in rows))
        unit = len(rows[0].samples)
        await supervised_step(config, recorder, trainer, sampler, batch, loss, unit)
        last, stopping = state.step == config.run.steps, stop.requested
        every = config.eval.every
        if last or (every and state.step % every == 0):
            await _evaluate(config, recorder, trainer, heldout)
        if last or stopping or state.step % config.checkpoint.every == 0:
            await recorder.save(trainer)
        if stopping:
            return


async def _evaluate(
    config: Config, recorder: Recorder, trainer: TrainerClient, heldout: list[Row]
) -> None:
    """Write down how the held-out rows score."""
    if not heldout:
        return
    recorder.view.phase("evaluation", f"{len(heldout):,} held-out rows")
    scores: list[float] = []
    for first in range(0, len(heldout), EVALUATED_AT_ONCE):
        scores += await _scores(trainer, heldout[first : first + EVALUATED_AT_ONCE])
    questions = [row.question for row in heldout]
    if config.reward_model.kind == "pairwise":
        measures = pair_measures(questions, scores[0::2], scores[1::2])
    else:
        labels = [row.samples[0].label for row in heldout]
        measures = label_measures(questions, scores, labels)
    recorder.evaluation({"step": recorder.state.step, **measures}, [])


async def _scores(trainer: TrainerClient, rows: list[Row]) -> list[float]:
    """Of all samples of `rows`, in their order."""
    samples = list(chain.from_iterable(row.samples for row in rows))
    # Every data-parallel rank has to get something: too few are sent several times.
    copies = -(-trainer.data_size // len(samples))
    await trainer.load([samples * copies])
    return (await trainer.sample_scores())[0][: len(samples)]


def _fingerprint(row: Row) -> str:
    digest = hashlib.sha256()
    for sample in row.samples:
        digest.update(sample.token_ids + b"%f" % sample.label)
    return digest.hexdigest()


def _next_commands(config: Config) -> list[tuple[str, str]]:
    folder, name = config.run.folder, config.reward_model.kind
    kind = "helpful" if config.reward_model.shown == "summary" else "safety"
    template = config.reward_model.template
    options = f"{{url: 'http://127.0.0.1:8000', model: {name}-rm"
    options += f", template: {template!r}}}" if template is not None else "}"
    return [
        (
            "serve it",
            f"python -m vllm.entrypoints.openai.api_server --model {folder}/hf --runner pooling "
            f"--served-model-name {name}-rm --port 8000",
        ),
        ("use it as a reward", f'megatron-r1 rl RECIPE.yaml --rewards.options.{kind} "{options}"'),
    ]
