"""Truths of prompts: the answers that they accept, and the choices that they name one of."""

from r1_grading.truths.choices import CHOICE_COLUMNS, check_choice
from r1_grading.truths.truth_values import (
    CHECKS,
    COMPARING_REWARDS,
    NO_TRUTH,
    accepted_answers,
    answer_after_mark,
    check_truth,
    guess_reward_kind,
    is_missing,
    math_truth,
    states_no_answer,
    truth_answer,
)
