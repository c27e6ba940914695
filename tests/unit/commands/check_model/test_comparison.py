"""What is sent to the trainer ranks for the comparison with transformers."""

import asyncio

from megatron_r1.commands.check_model import comparisons
from megatron_r1.commands.check_model.results import ReferenceResult
from megatron_r1.config import Config
from megatron_r1.trainer.operations import EvaluationOperations


class ProbedTrainer:
    """A trainer that records the samples of a probe, and that it was closed."""

    probed: list = []
    closed = 0

    def __init__(self, config, folder):
        pass

    def launch(self):
        pass

    async def connect(self):
        pass

    async def call(self, operation, samples):
        assert operation == EvaluationOperations.probe
        self.probed.extend(samples)
        return {"probe/max": 0.25}

    async def close(self):
        type(self).closed += 1


def test_every_sequence_of_the_reference_is_compared(monkeypatch, tmp_path):
    monkeypatch.setattr(comparisons, "TrainerClient", ProbedTrainer)
    sequences, logprobs = [[5, 6, 7], [8, 9]], [[-1.0, -2.0], [-3.0]]
    reference = ReferenceResult(1, None, False, sequences, logprobs, 0.0)
    assert asyncio.run(comparisons.compare_with_megatron(Config(), reference, tmp_path)) == 0.25
    assert [len(sample) for sample in ProbedTrainer.probed] == [3, 2]
    assert [sample.prompt_length for sample in ProbedTrainer.probed] == [1, 1]
    assert ProbedTrainer.closed == 1
