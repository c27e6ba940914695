"""Passes that train nothing: they compare the log-probabilities of a few tokens with an engine's,
and score the loaded samples with a reward model."""

import torch
from torch import Tensor

from megatron_r1.trainer.batch import PackedMicrobatch
from megatron_r1.trainer.metrics import logprob_diff, reduce_over_data
from megatron_r1.trainer.operations import SampleScores
from megatron_r1.trainer.trainer import Trainer
from megatron_r1.trainer.training_sample import Sample


class EvaluationPasses:
    """Runs probes and a reward model's scores on the model of a trainer, without training it."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self._probed: list[PackedMicrobatch] = []

    def probe(self, samples: list[Sample]) -> dict[str, float]:
        """Return the mean and the largest difference of an engine's log-probabilities, at
        temperature 1, and the trainer's.

        Loaded samples stay.

        Args:
            samples: the samples to compare, the same on every rank."""
        self.prepare_probe(samples)
        return self.compare_probe(samples)

    def prepare_probe(self, samples: list[Sample]) -> None:
        """Compute, and keep for `compare_probe`, the log-probabilities of samples before an
        engine does."""
        self._probed = self.trainer.rollout.pack_probe(samples)
        # An engine's answer to a probe comes without its routing.
        with self.trainer.replay.pause():
            self.trainer.fill_logprobs(self._probed, "old", 1.0)

    def compare_probe(self, samples: list[Sample]) -> dict[str, float]:
        """Return the differences that `probe` does, without weights: `prepare_probe` has had the
        same tokens. The samples have an engine's log-probabilities."""
        batches = self.trainer.rollout.pack_probe(samples)
        if not self.trainer.grid_position.is_last_stage:
            return {}
        for batch, probed_batch in zip(batches, self._probed, strict=True):
            assert torch.equal(batch.targets, probed_batch.targets), "these are other tokens"
            batch.logprobs["old"] = probed_batch.logprobs["old"]
        mean, max_diff = logprob_diff(batches, "old")
        return reduce_over_data(
            self.trainer.grid_position, {"probe/max": max_diff, "probe/mean": mean}
        )

    def sample_scores(self) -> SampleScores:
        """Return {"scores": s}, s[i][m] a score model's scores of the samples of micro-batch m of
        mini-batch i; empty on ranks before the last stage."""
        scores: list[list[list[float]]] = []
        for batches in self.trainer.rollout.minibatches:
            reports = self.trainer.run_batches(batches, self._scores_only, forward_only=True)
            scores.append(reports if self.trainer.grid_position.is_last_stage else [])
        return {"scores": scores}

    def _scores_only(self, batch: PackedMicrobatch, out: Tensor) -> list[float]:
        return self.trainer.heads.scores(batch, out).last_token_scores().tolist()
