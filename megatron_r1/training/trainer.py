"""One trainer rank: Megatron's model, optimizer and schedule behind four verbs.

load() puts a rollout's micro-batches in place; score() computes old and reference
log-probabilities; update() makes one optimizer step; probe() compares a few tokens with an
engine. Each is called on every rank at the same time. The rank knows samples and losses, not
prompts or rewards."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from megatron.core import parallel_state

from megatron_r1 import models, platform, weights
from megatron_r1.config import Config
from megatron_r1.models import fp8
from megatron_r1.models.hf_config import has_score_head
from megatron_r1.models.replay import Replay
from megatron_r1.models.routing_shape import routing_shape
from megatron_r1.training import construction
from megatron_r1.training.checkpoints import contents, loading
from megatron_r1.training.checkpoints.writer import CheckpointWriter
from megatron_r1.training.construction import DTYPES
from megatron_r1.training.critic import Critic, needs_critic
from megatron_r1.training.distributed import Place
from megatron_r1.training.head import Head
from megatron_r1.training.losses import Loss, find_function, find_loss
from megatron_r1.training.packed import PackedBatch, Split, packed_batch
from megatron_r1.training.passes import (
    merge_reports,
    optimizer_step,
    reduce_over_data,
    run_passes,
)
from megatron_r1.training.reference import Reference
from megatron_r1.training.routing import RoutingPart
from megatron_r1.training.scores import Scores
from megatron_r1.training.token_advantages import Scored
from megatron_r1.training.wire import Microbatches, Sample


class Trainer:
    def __init__(self, config: Config, place: Place):
        """Build this rank's part of the model. Raises ValueError for a model or layout that cannot
        be.
        """
        self.config, self.place = config, place
        self.hf = models.read_hf_config(config.model.path, config.model.head)
        self.transformer = construction.transformer(config, self.hf)
        self.bare = construction.model_chunks(config, self.hf, self.transformer)
        self.chunks = construction.with_gradients(self.transformer, self.bare)
        self.optimizer = construction.new_optimizer(config, self.chunks)
        self.transformer.grad_scale_func = self.optimizer.scale_loss
        self.reference: Reference | None = None
        self.saving = CheckpointWriter(keep_memory=config.checkpoint.asynchronous)
        self._verified: str | None = None
        self.minibatches: list[list[PackedBatch]] = []
        self.split = Split(
            config.parallel.tensor,
            config.parallel.context,
            parallel_state.get_context_parallel_rank(),
            fp8.token_multiple(config.fp8),
        )
        shape = routing_shape(self.hf) if config.rl.routing_replay else None
        self.replay = Replay(self.bare, shape)
        split = (place.tensor_rank, config.parallel.tensor)
        self.routing = RoutingPart(shape, self.replay.layers, *split) if shape else None
        self.critic = Critic(config, place) if needs_critic(config) else None

    @property
    def score_is_new(self) -> bool:
        """Whether the model is a score model whose head was drawn, not loaded."""
        return construction.language_body(self.config, self.hf) is not None

    @property
    def num_parameters(self) -> int:
        """Of the whole model, from its table of tensors."""
        return sum(math.prod(shape) for shape, _ in weights.hf_tensors(self.hf).values())

    def load(self, minibatches: list[Microbatches]) -> dict[str, float]:
        """Put samples in place: minibatches[i].samples[m] is micro-batch m of update i.

        Returns the share of padding in what is computed, "packing/padding"."""
        self.minibatches = [
            [
                packed_batch(s, self.split, platform.device(), self.routing)
                for s in self._in_rounds(step.samples)
            ]
            for step in minibatches
        ]
        samples = [s for step in minibatches for batch in step.samples for s in batch]
        # Ranks along the context axis hold parts of the same samples, and are added up as well.
        own = sum(len(s) for s in samples) / self.config.parallel.context
        slots = sum(batch.input_ids.numel() for step in self.minibatches for batch in step)
        sums = {"packing/padding/slots": slots - own, "slots": slots}
        return reduce_over_data(self.place, sums, {})

    def _in_rounds(self, microbatches: list[list[Sample]]) -> list[list[Sample]]:
        """With empty ones added where chunks are interleaved: that schedule goes in rounds of as
        many micro-batches as there are pipeline ranks."""
        missing = -len(microbatches) % self.config.parallel.pipeline if len(self.chunks) > 1 else 0
        return microbatches + [[]] * missing

    def keep_reference(self) -> None:
        """Make the present policy the reference."""
        if self.reference is None:
            on_host = self.config.parallel.reference_offload == "host"
            self.reference = Reference(self.bare, on_host)
        else:
            self.reference.refresh()

    def score(
        self, temperature: float, reference: bool, first_old: bool = True
    ) -> dict[str, float]:
        """Log-probabilities of every loaded token under the present policy ("old") and, if asked,
        the reference. first_old False: those of mini-batch 0 under the present policy are left to
        its update, which is made at that very policy and has them anyway.

        With routing replay returns how far the engine's are from the trainer's without it, of the
        first micro-batches. The reference always routes for itself: it is a model, not a view of
        the policy's samples."""
        batches = [batch for step in self.minibatches for batch in step]
        later = batches if first_old else batches[len(self.minibatches[0]) :]
        with self.replay.measured():
            self._score(later, "old", temperature)
        with self.replay.paused():
            if reference:
                assert self.reference is not None, "keep_reference() comes first"
                with self.reference.in_place():
                    self._score(batches, "reference", temperature)
            first = batches[: len(self._in_rounds([[]]))] if self.replay.is_on else []
            if first:
                self._score(first, "own_routing", temperature)
        metrics = self.replay.agreement(platform.device())
        if first:
            gap, count, _ = self._gap(first, "own_routing")
            sums = {"logprob_diff/without_replay/first": gap, "first": count}
            metrics |= reduce_over_data(self.place, sums, {})
        return metrics

    def token_advantages(self, function: str, settings: dict[str, Any]) -> None:
        """Replace the advantages of all loaded samples, which are scored, by those that the
        `TokenAdvantages` at "module:function" gives each token."""
        if not self.place.last_stage:
            return
        batches = [batch for step in self.minibatches for batch in step]
        scored = Scored(
            batches,
            parallel_state.get_context_parallel_group(),
            parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        find_function(function, "token advantages")(scored, settings)

    def agreement(self) -> dict[str, float]:
        """How far the engine's log-probabilities of the loaded samples are from the trainer's
        "old" ones, once these are known: mean and largest difference over response tokens.

        With a teacher also teacher/kl, the sampled estimate of KL(π_old ‖ teacher): the mean of
        log π_old - log π_teacher over the same tokens."""
        batches = [batch for step in self.minibatches for batch in step]
        gap, count, largest = self._gap(batches, "old")
        sums = {"logprob_diff/mean/tokens": gap, "tokens": count}
        if self.config.teacher.path and self.place.last_stage:
            gaps = (_log_ratio(batch, "old", "teacher") for batch in batches)
            sums["teacher/kl/tokens"] = sum(gaps)
        return reduce_over_data(self.place, sums, {"logprob_diff/max": largest})

    def _gap(self, batches: list[PackedBatch], name: str) -> tuple[float, int, float]:
        """Sum, number and largest of |trainer's - engine's log-probability| of response tokens."""
        gap, count, largest = 0.0, 0, 0.0
        for batch in batches if self.place.last_stage else []:
            gaps = (batch.logprobs[name] - batch.rollout_logprobs)[batch.is_response].abs()
            gap, count = gap + gaps.double().sum().item(), count + gaps.numel()
            largest = max(largest, gaps.max().item() if gaps.numel() else 0.0)
        return gap, count, largest

    def update(
        self, index: int, loss: str, settings: dict[str, Any], learning_rate: float
    ) -> dict[str, float]:
        """One optimizer step on mini-batch `index` with the loss at "module:function".

        Returns the loss's metrics over the whole mini-batch, grad_norm and whether the step was
        taken."""
        batches = self.minibatches[index]
        settings = dict(settings)
        temperature = settings.pop("temperature", 1.0)
        compute = partial(self._loss, find_loss(loss), settings, temperature)
        run = partial(self._run, batches, compute, forward_only=False)
        reports, stepped = optimizer_step(self.chunks, self.optimizer, learning_rate, run)
        return reduce_over_data(self.place, *merge_reports(reports)) | stepped

    def values(self) -> None:
        """The critic's values of all loaded samples, into `PackedBatch.values`."""
        assert self.critic is not None, "the recipe has no critic"
        self.critic.values([batch for step in self.minibatches for batch in step])

    def update_critic(self, index: int, learning_rate: float) -> dict[str, float]:
        """One optimizer step of the critic on mini-batch `index`, whose values and returns are
        there; metrics value/…"""
        assert self.critic is not None, "the recipe has no critic"
        return self.critic.update(self.minibatches[index], learning_rate)

    def sample_scores(self) -> dict[str, list[list[list[float]]]]:
        """Of a score model: scores[i][m] of the samples of micro-batch m of mini-batch i, empty on
        the ranks that do not know them."""
        found: list[list[list[float]]] = []
        for chunk in self.chunks:
            chunk.eval()
        for batches in self.minibatches:
            with torch.no_grad():
                reports = self._run(batches, self._scores_only, forward_only=True)
            found.append(reports if self.place.last_stage else [])
        return {"scores": found}

    def probe(self, samples: list[dict[str, Any]]) -> dict[str, float]:
        """How far an engine's log-probabilities, at temperature 1, are from the trainer's: of these
        samples (`wire.Sample`), the same on every rank; loaded ones stay."""
        own = msgspec.convert(samples, list[Sample])
        batches = [packed_batch(s, self.split, platform.device()) for s in self._in_rounds([own])]
        with self.replay.paused():
            self._score(batches, "old", 1.0)
        gap, count, largest = self._gap(batches, "old")
        sums = {"probe/mean/tokens": gap, "tokens": count}
        return reduce_over_data(self.place, sums, {"probe/max": largest})

    def export(self, folder: str, dtype: str | None = None) -> None:
        """Write a complete Hugging Face folder: weights, config and tokenizer."""
        weights.save_hf(
            self.bare,
            self.hf,
            Path(self.config.model.path),
            Path(folder),
            dtype=DTYPES[dtype or self.config.model.dtype],
        )

    def save_checkpoint(self, folder: str, state: dict[str, Any]) -> None:
        """Start to write everything a run needs to go on, with the controller's `state` beside it.

        Returns when the tensors are copied; `checkpoint_progress` tells the rest."""
        parts = (self.bare, self.optimizer, self.reference, self.critic)
        self.saving.save(Path(folder), partial(contents.sharded, *parts), state)

    def checkpoint_progress(self, wait: bool = False) -> dict[str, Any]:
        """Of the latest `save_checkpoint`: is_done, error (a sentence or None), seconds."""
        progress = self.saving.progress(wait)
        assert progress is not None, "save_checkpoint() comes first"
        return {
            "is_done": progress.is_done,
            "error": progress.error,
            "seconds": progress.seconds,
        }

    def verify_checkpoint(self, folder: str) -> dict[str, Any]:
        """What is damaged in `folder`, as thoroughly as `checkpoint.verify` says; a line each."""
        damage = loading.damage(Path(folder), self.config.checkpoint.verify)
        self._verified = None if damage else folder
        return {"damage": damage}

    def load_checkpoint(self, folder: str, reference: bool) -> dict[str, Any]:
        """Verify `folder` and continue from it; `reference`: whether it holds a reference policy.

        Returns is_same_layout: whether random streams continued too, or stay seeded anew."""
        if folder != self._verified:
            damage = self.verify_checkpoint(folder)["damage"]
            if damage:
                raise ValueError(f"checkpoint {folder} is damaged: {'; '.join(damage[:5])}")
        if reference:
            self.keep_reference()
        parts = (self.bare, self.optimizer, self.reference, self.critic)
        is_same = loading.load(Path(folder), *parts)
        return {"is_same_layout": is_same}

    def _score(self, batches: list[PackedBatch], name: str, temperature: float) -> None:
        if not batches:
            return
        for chunk in self.chunks:
            chunk.eval()
        compute = partial(self._logprobs_only, name, temperature)
        with torch.no_grad():  # forward_only alone leaves Megatron recording a graph
            self._run(batches, compute, forward_only=True)

    def _run(self, batches: list[PackedBatch], compute, forward_only: bool) -> list[Any]:
        """Megatron's schedule over `batches`; what `compute` reported, on the last stage."""
        train_mtp = self.config.model.mtp == "train" and not forward_only

        def inputs(model, batch):
            self.replay.begin(model, batch.routing)
            if not train_mtp:
                return {}
            return {
                "labels": batch.targets[None],
                "loss_mask": batch.is_response[None].float(),
            }

        reports = run_passes(
            self.chunks, batches, compute, forward_only=forward_only, inputs=inputs
        )
        self.replay.end()
        return reports

    def _head(self, batch: PackedBatch, hidden, temperature: float) -> Head | Scores:
        if has_score_head(self.hf):
            group = parallel_state.get_context_parallel_group()
            return Scores(batch, hidden.view(-1), group)
        return Head(
            batch,
            hidden.reshape(-1, hidden.shape[-1]),
            models.lm_head_weight(self.bare[-1]),
            temperature,
            parallel_state.get_tensor_model_parallel_group(),
            self.hf["vocab_size"],
            parallel_state.get_context_parallel_group(),
        )

    def _logprobs_only(self, name: str, temperature: float, batch: PackedBatch, hidden):
        batch.logprobs[name] = self._head(batch, hidden, temperature).logprobs()[0]
        zero = torch.zeros((), device=hidden.device)
        return zero, zero.int(), {}

    def _loss(self, loss: Loss, settings, temperature: float, batch: PackedBatch, hidden):
        terms = loss(batch, self._head(batch, hidden, temperature), settings)
        return terms.loss, terms.denominator, {"sums": terms.sums, "maxima": terms.maxima}

    def _scores_only(self, batch: PackedBatch, hidden):
        zero = torch.zeros((), device=hidden.device)
        return zero, zero.int(), self._head(batch, hidden, 1.0).of_samples().tolist()


def _log_ratio(batch: PackedBatch, name: str, other: str) -> float:
    """Sum of the differences of two policies' log-probabilities over response tokens."""
    gaps = (batch.logprobs[name] - batch.logprobs[other])[batch.is_response]
    return gaps.double().sum().item()
