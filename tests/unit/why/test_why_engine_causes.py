"""What `why` names as the cause of an engine's log-probabilities."""

from types import SimpleNamespace

import pytest

from megatron_r1.why.checks.engine_causes import stale_weights
from megatron_r1.why.checks.engine_gaps import ExplainedEngine


@pytest.mark.parametrize(
    ("lora", "version", "words"),
    [
        ("adapters", 0, "engine-0 computed without adapters"),
        ("adapters", 1, "engine-0 computed with the weights of version 1, not 2"),
        (None, 0, "engine-0 computed with the weights of version 0, not 2"),
    ],
)
def test_an_engine_at_the_beginning_of_a_run_with_adapters_has_none(lora, version, words):
    step = SimpleNamespace(
        metrics_row={}, run_config=SimpleNamespace(model=SimpleNamespace(lora=lora))
    )
    gaps = SimpleNamespace(
        step=step,
        newest_version=2,
        policies=SimpleNamespace(logprobs_after=None),
        stale_version=lambda logprobs: (version, ExplainedEngine(1e-6, 0.1, "engine-0")),
        engine_means=dict,
        tolerance=1e-4,
    )
    assert words in stale_weights(gaps).reason
