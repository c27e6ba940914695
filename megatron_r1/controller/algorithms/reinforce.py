"""REINFORCE (Williams, Machine Learning 8, 1992), with the rollout's mean as its baseline.

    A_i = r_i - mean(r), over all responses of the rollout
    J   = 1/(N L) Σ_i Σ_t ρ A_i,  L a constant: max_response_tokens

Its gradient at ρ = 1 is A_i ∇ log π_θ(o_i) / (N L): a response is one action, whose log-probability
is the sum of its tokens', so tokens are summed and not averaged. One update per rollout keeps ρ at
1; with more `minibatches` ρ corrects each token, inside clips that hardly ever bound it.
`advantage_std` batch divides by the rollout's standard deviation. The mean includes the response's
own reward, which scales the gradient by (N - 1) / N. No KL."""

from statistics import fmean

from r1_grading.terms import rewards_equal

from megatron_r1.config import RLConfig
from megatron_r1.controller.advantages import divide_by_batch_std, drop_ungraded


def advantages(groups: list[list[float | None]], rl: RLConfig) -> list[list[float]]:
    """Return A_i = r_i - mean(r), over the rollout's graded responses; 0 for an ungraded
    one, and for all where the rewards are equal."""
    graded_rewards = [reward for rewards in groups for reward in drop_ungraded(rewards)]
    if rewards_equal(graded_rewards):
        return [[0.0] * len(rewards) for rewards in groups]
    mean = fmean(graded_rewards)
    by_group = [[0.0 if r is None else r - mean for r in rewards] for rewards in groups]
    if rl.advantage_std == "batch":
        return divide_by_batch_std(by_group, groups, rl.advantage_epsilon)
    return by_group
