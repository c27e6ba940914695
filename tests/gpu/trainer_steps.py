"""The trainer computes log-probabilities before and after one update, on these ranks:
`python tests/gpu/trainer_steps.py RECIPE EXPECTED RESULTS`, as torchrun starts them.

Where EXPECTED is missing, RESULTS are the log-probabilities of every sample's tokens before and
after the update, and its metrics. Otherwise they are the differences from EXPECTED's."""

import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_r1.config import Config, load_recipe
from megatron_r1.controller import algorithms
from megatron_r1.controller.trainer_calls.packing import pack_samples
from megatron_r1.trainer import distributed
from megatron_r1.trainer.metrics import Mean, reduce_over_data
from megatron_r1.trainer.training_sample import Sample

NUM_SAMPLES = 16
MAX_PROMPT, MAX_RESPONSE = 40, 100
LEARNING_RATE = 0.2
"""Changes log-probabilities by some tenths in one update, ten times what bf16's rounding does."""
FAR_DIFFERENCE = 0.2
"""More than this does not count as a difference: where rounding chooses another expert, a token's
log-probability differs by up to 2 nats."""

Logprobs = Sequence[Sequence[float]]
"""Of each sample's response."""


def samples(
    vocabulary: int, logprobs: Logprobs | None, earlier_logprobs: Logprobs | None
) -> list[Sample]:
    """Samples of all lengths, with their log-probabilities now and before the update, for
    `distances`."""
    draw, sample_list = random.Random(1), []
    for index in range(NUM_SAMPLES):
        prompt = [draw.randrange(vocabulary) for _ in range(draw.randint(1, MAX_PROMPT))]
        response = [draw.randrange(vocabulary) for _ in range(draw.randint(1, MAX_RESPONSE))]
        rollout_logprobs, teacher_logprobs = (
            values[index] if values else [0.0] * len(response)
            for values in (logprobs, earlier_logprobs)
        )
        advantage = draw.uniform(-2, 2)
        sample_list.append(
            Sample.pack(
                prompt, response, rollout_logprobs, advantage, teacher_logprobs=teacher_logprobs
            )
        )
    return sample_list


class Steps:
    """The trainer of a configuration, with its samples."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.grid_position = distributed.initialize(config.parallel, seed=0)
        from megatron_r1.trainer.trainer import Trainer

        self.trainer = Trainer(config, self.grid_position)
        self.vocabulary = self.trainer.hf_config["vocab_size"]
        self.trainer.refresh_reference()

    def compute_logprobs(
        self, logprobs: Logprobs | None = None, earlier_logprobs: Logprobs | None = None
    ) -> None:
        """Compute the log-probabilities of the samples."""
        sample_list = samples(self.vocabulary, logprobs, earlier_logprobs)
        lengths = [len(sample) for sample in sample_list]
        max_tokens = self.config.parallel.microbatch_tokens
        self.plan = pack_samples(lengths, self.grid_position.data_parallel_size, max_tokens).shares[
            self.grid_position.data_rank
        ]
        self.trainer.load([[[sample_list[i] for i in members] for members in self.plan]])
        self.trainer.compute_logprobs(1.0, with_reference=self.config.uses_reference)

    def distances(self) -> dict[str, float]:
        """Return how far log-probabilities, and their changes, are from the samples'.

        That is the mean difference, one of at most `FAR_DIFFERENCE` for each, and the cosine
        between the changes since `earlier_logprobs`, here and there; empty but on the last
        stage."""
        names = ("gap", "xy", "xx", "yy", "moved")
        sums = torch.zeros(len(names), dtype=torch.float64)
        count = 0
        for batch in (
            self.trainer.rollout.minibatches[0] if self.grid_position.is_last_stage else []
        ):
            logprobs = batch.logprobs["old"], batch.rollout_logprobs, batch.logprobs["teacher"]
            measured, expected, start = (
                values[batch.is_response].double().cpu() for values in logprobs
            )
            x, y = measured - start, expected - start
            gaps = (measured - expected).abs().clamp(max=FAR_DIFFERENCE)
            sums += torch.stack([gaps.sum(), x @ y, x @ x, y @ y, y.abs().sum()])
            count += len(gaps)
        means = {name: Mean(total, count) for name, total in zip(names, sums, strict=True)}
        global_means = reduce_over_data(self.grid_position, means)
        if not global_means:
            return {}
        lengths = math.sqrt(global_means["xx"] * global_means["yy"])
        cosine = global_means["xy"] / lengths if lengths else 0.0
        return {"gap": global_means["gap"], "moved": global_means["moved"], "cosine": cosine}

    def logprobs(self) -> list[list[float]]:
        """Return the log-probabilities of every response, on a rank that has all samples."""
        response_logprobs: dict[int, list[float]] = {}
        sample_list = samples(self.vocabulary, None, None)
        for members, batch in zip(self.plan, self.trainer.rollout.minibatches[0], strict=True):
            values = batch.logprobs["old"][batch.is_response].tolist()
            for member in members:
                length = len(sample_list[member]) - sample_list[member].prompt_length
                response_logprobs[member], values = values[:length], values[length:]
            assert not values
        return [response_logprobs[index] for index in range(NUM_SAMPLES)]

    def update(self) -> dict[str, float]:
        """Make an update by the recipe's algorithm."""
        rl = self.config.rl
        loss = algorithms.find_algorithm(rl.algorithm).loss
        settings = rl.loss_settings(MAX_RESPONSE)
        return self.trainer.update(0, loss, settings, LEARNING_RATE, 1.0)

    @property
    def reports(self) -> bool:
        """Whether this rank is the one that has the metrics to write."""
        grid_position = self.grid_position
        is_first_context = self.trainer.process_groups.cp.rank() == 0
        is_first = grid_position.data_rank == grid_position.tensor_rank == 0 and is_first_context
        return grid_position.is_last_stage and is_first


def reference_steps(steps: Steps) -> dict[str, Any]:
    """Return what the steps give on one rank."""
    steps.compute_logprobs()
    before = steps.logprobs()
    steps.compute_logprobs(before)
    update = steps.update()
    steps.compute_logprobs()
    return {"before": before, "update": update, "after": steps.logprobs()}


def compare_steps(steps: Steps, expected: dict[str, Any]) -> dict[str, Any]:
    """Return how the results of the steps differ from `expected`, which is what one rank gave."""
    from megatron_r1.trainer.implementations import describe_implementations

    before, after = expected["before"], expected["after"]
    steps.compute_logprobs(before, before)
    differences: dict[str, Any] = {"before": steps.distances(), "update": steps.update()}
    steps.compute_logprobs(after, before)
    return differences | {
        "after": steps.distances(),
        "parts": describe_implementations(steps.trainer),
    }


def main(recipe: Path, expected: Path, results: Path) -> None:
    """Run the steps, and write what they give."""
    steps = Steps(load_recipe(recipe))
    if not expected.exists():
        found = reference_steps(steps)
        for moment in ("before", "after"):
            found[moment] = [[round(value, 6) for value in row] for row in found[moment]]
        results.write_text(json.dumps(found))
    else:
        differences = compare_steps(steps, json.loads(expected.read_text()))
        if steps.reports:
            results.write_text(json.dumps(differences))
    distributed.leave_process_groups()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
