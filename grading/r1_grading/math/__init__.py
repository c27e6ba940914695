"""The reward `math`: the response's final answer is compared with the truth.

`accuracy` grades; `comparison` has the rules."""

from r1_grading.math.accuracy import grade, grade_equivalence, same_answer
