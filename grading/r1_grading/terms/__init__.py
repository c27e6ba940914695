"""The terms of a recipe's reward: read from it, called for a response, and added up.

The reward of a response is the weighted sum of its terms, each weighted from step to step.
`weights` and `options` read the recipe, `reward_terms` calls the terms, `combined_reward` adds them
up."""

from r1_grading.terms.combined_reward import Reward, combine, compare_rewards, rewards_equal
from r1_grading.terms.options import (
    RUN_ARGUMENTS,
    Options,
    option_names,
    read_options,
    reward_arguments,
)
from r1_grading.terms.reward_terms import Gradable, RewardTerms, RewardUnusable
from r1_grading.terms.weights import (
    ACCURACY,
    DEFAULT_WEIGHTS,
    ScheduledWeight,
    read_weights,
    weights_at,
)
