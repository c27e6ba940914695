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
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_r1 import models, platform, weights
from megatron_r1.config import Config
from megatron_r1.models import fp8
from megatron_r1.models.replay import Replay
from megatron_r1.models.routing_shape import routing_shape
from megatron_r1.training import construction
from megatron_r1.training.checkpoints import contents, loading
from megatron_r1.training.checkpoints.writer import CheckpointWriter
from megatron_r1.training.construction import DTYPES
from megatron_r1.training.distributed import Place
from megatron_r1.training.head import Head
from megatron_r1.training.losses import Loss, find_loss
from megatron_r1.training.packed import PackedBatch, Split, packed_batch
from megatron_r1.training.reference import Reference
from megatron_r1.training.routing import RoutingPart
from megatron_r1.training.wire import Microbatches, Sample


class Trainer:
    def __init__(self, config: Config, place: Place):
        """Build this rank's part of the model. Raises ValueError for a model or layout that cannot
        be.
        """
        self.config, self.place = config, place
        self.hf = models.read_hf_config(config.model.path)
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
        self.schedule = get_forward_backward_func()

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
        return self._reduce_over_data({"packing/padding/slots": slots - own, "slots": slots}, {})

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
            metrics |= self._reduce_over_data(sums, {})
        return metrics

    def agreement(self) -> dict[str, float]:
        """How far the engine's log-probabilities of the loaded samples are from the trainer's
        "old" ones, once these are known: mean and largest difference over response tokens."""
        batches = [batch for step in self.minibatches for batch in step]
        gap, count, largest = self._gap(batches, "old")
        sums = {"logprob_diff/mean/tokens": gap, "tokens": count}
        return self._reduce_over_data(sums, {"logprob_diff/max": largest})

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
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        compute = partial(self._loss, find_loss(loss), settings, temperature)
        reports = self._run(batches, compute, forward_only=False)
        succeeded, grad_norm, _ = self.optimizer.step()
        sums, maxima = _merge(reports)
        metrics = self._reduce_over_data(sums, maxima)
        metrics |= {"grad_norm": float(grad_norm), "step_taken": float(succeeded)}
        return metrics

    def probe(self, samples: list[dict[str, Any]]) -> dict[str, float]:
        """How far an engine's log-probabilities, at temperature 1, are from the trainer's: of these
        samples (`wire.Sample`), the same on every rank; loaded ones stay."""
        own = msgspec.convert(samples, list[Sample])
        batches = [packed_batch(s, self.split, platform.device()) for s in self._in_rounds([own])]
        with self.replay.paused():
            self._score(batches, "old", 1.0)
        gap, count, largest = self._gap(batches, "old")
        sums = {"probe/mean/tokens": gap, "tokens": count}
        return self._reduce_over_data(sums, {"probe/max": largest})

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
        parts = (self.bare, self.optimizer, self.reference)
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
        is_same = loading.load(Path(folder), self.bare, self.optimizer, self.reference)
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

        def forward_step(iterator, model):
            batch = next(iterator)
            self.replay.begin(model, batch.routing)
            labels = {}
            if train_mtp:
                labels = {
                    "labels": batch.targets[None],
                    "loss_mask": batch.is_response[None].float(),
                }
            hidden = model(
                batch.input_ids,
                batch.position_ids,
                None,
                packed_seq_params=batch.packed_seq_params,
                **labels,
            )
            return hidden, partial(compute, batch)

        interleaved = len(self.chunks) > 1
        reports = self.schedule(
            forward_step_func=forward_step,
            data_iterator=[iter(batches) for _ in self.chunks] if interleaved else iter(batches),
            model=self.chunks,
            num_microbatches=len(batches),
            seq_length=max(batch.input_ids.shape[1] for batch in batches),
            micro_batch_size=1,
            forward_only=forward_only,
        )
        self.replay.end()
        return reports

    def _head(self, batch: PackedBatch, hidden, temperature: float) -> Head:
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

    def _reduce_over_data(self, sums: dict[str, Any], maxima: dict[str, Any]) -> dict[str, float]:
        """Add up over the data-parallel ranks of the last stage; of "a/b" and "b", a / b stays."""
        if not self.place.last_stage:
            return {}
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        device = platform.device()
        added = torch.tensor([float(v) for v in sums.values()], dtype=torch.float64, device=device)
        largest = torch.tensor(
            [float(v) for v in maxima.values()], dtype=torch.float64, device=device
        )
        dist.all_reduce(added, group=group)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        total = dict(zip(sums, added.tolist(), strict=True))
        metrics = dict(zip(maxima, largest.tolist(), strict=True))
        wholes = {name.rpartition("/")[2] for name in total if "/" in name}
        for name, value in total.items():
            part, _, whole = name.rpartition("/")
            if part:
                metrics[part] = value / total[whole] if total[whole] else 0.0
            elif name not in wholes:
                metrics[name] = value
        return metrics


def _merge(reports: list[dict[str, dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Add up and take the maximum over micro-batches."""
    sums: dict[str, Any] = {}
    maxima: dict[str, Any] = {}
    for report in reports:
        for name, value in report["sums"].items():
            sums[name] = sums.get(name, 0.0) + float(value)
        for name, value in report["maxima"].items():
            maxima[name] = max(maxima.get(name, -math.inf), float(value))
    return sums, maxima
