"""vLLM's rejection sampler, as our plugin leaves it on a CPU: drafts change no distribution.

Oracle: softmax of the logits. Without the patch of engines/plugin/cpu_patches.py both tests fail.
"""

import pytest
import torch
from draft_sampler import DRAFTS, VOCABULARY, draw, nucleus, probability

SAMPLES = 20_000
# Of a chi-square statistic this large, for a right sampler, at each of two positions and two
# settings; it notices one draft in 20 that is accepted without being tested.
LEAST_PROBABILITY = 1e-5


@pytest.mark.slow  # test_speculative.py samples with drafts in `make test`
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.9)])
def test_drafts_change_no_distribution_and_no_log_probability(oracle, temperature, top_p):
    logits, drafts, samples, gap = oracle(draw, SAMPLES, temperature, top_p)
    assert gap <= 1e-5
    expected = nucleus(torch.tensor(logits, dtype=torch.float64) / temperature, top_p)
    for at in range(DRAFTS + 1):
        # Tokens behind accepted drafts only: the others are sampled in the next pass.
        tokens = [sample[at] for sample in samples if sample[at] is not None]
        found = torch.bincount(torch.tensor(tokens), minlength=VOCABULARY)
        assert probability(found, expected[at]) > LEAST_PROBABILITY, f"token {at}"
        if at < DRAFTS:
            biased = found - found // 20
            biased[drafts[at]] += (found // 20).sum()
            assert probability(biased, expected[at]) < LEAST_PROBABILITY
    accepted = sum(sample[1] is not None for sample in samples) / SAMPLES
    assert accepted == pytest.approx(expected[0, drafts[0]].item(), abs=0.02)
