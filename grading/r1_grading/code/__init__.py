"""Accuracy of programs: `grade` runs the response's program on the tests that `problem` reads,
and `asserts` where they are Python."""

from r1_grading.code.grader import equal_output, equal_result, find_program, grade
