"""What an engine sampled against what transformers says of it; for tests of real engines."""

import asyncio
from itertools import groupby, islice

from tiny_models import logprobs_before_near_ties

# fp32 on both sides, sums of a few hundred terms in another order: about 4e-6 is seen.
TOLERANCE = 1e-4
PROMPTS = [[5, 9, 33, 12], [60], list(range(3, 40))]


async def sample(engine, *, n=4, max_tokens=24, **sampling):
    """A group for each prompt, all at once; `engine` is a fleet or a client."""
    calls = (engine.generate(prompt, n=n, max_tokens=max_tokens, **sampling) for prompt in PROMPTS)
    return await asyncio.gather(*calls)


async def sample_amid_a_push(fleet, push, before, after, **sampling):
    """Groups whose every response the model in `before` began and that in `after` ended, and
    version → model; `push(model)` is the fleet's next version."""
    for _ in range(5):  # a busy machine may end a response before the push does
        await push(before)
        made_by = {fleet.policy_version: before, fleet.policy_version + 1: after}
        running = asyncio.ensure_future(sample(fleet, max_tokens=200, **sampling))
        await sample(fleet, max_tokens=8)  # sent later and sampled next to them: they have begun
        await push(after)
        groups = await running
        if successions(groups) == {tuple(made_by)}:
            break
    return groups, made_by


def largest_difference(oracle, folder, groups, temperature=1.0):
    """Of a log-probability of a sampled token from transformers' with the model in `folder`.
    groups: of PROMPTS."""
    return largest_by_version(oracle, dict.fromkeys(stamped(groups), folder), groups, temperature)


def largest_by_version(oracle, made_by, groups, temperature=1.0):
    """As `largest_difference`, from that of the model which the token is stamped with. What comes
    after a near tie of experts is not compared."""
    largest, num_compared, num_tokens = 0.0, 0, 0
    for prompt, group in zip(PROMPTS, groups, strict=True):
        responses = [list(completion.token_ids) for completion in group]
        expected = {
            version: oracle(logprobs_before_near_ties, folder, prompt, responses, temperature)
            for version, folder in made_by.items()
        }
        for index, made in enumerate(group):
            end = min(len(of_responses[index]) for of_responses in expected.values())
            num_compared, num_tokens = num_compared + end, num_tokens + len(made.logprobs)
            stamped_logprobs = zip(made.logprobs, made.policy_versions, strict=True)
            for at, (logprob, version) in enumerate(islice(stamped_logprobs, end)):
                largest = max(largest, abs(logprob - expected[version][index][at]))
    assert num_compared > num_tokens / 2, f"{num_compared} of {num_tokens} tokens are compared"
    return largest


def stamped(groups):
    """The policy versions that made these tokens."""
    return {v for group in groups for completion in group for v in completion.policy_versions}


def successions(groups):
    """In which order which policy versions made a response, of all responses."""
    made = (completion.policy_versions for group in groups for completion in group)
    return {tuple(version for version, _ in groupby(versions)) for versions in made}
