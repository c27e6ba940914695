"""Accuracy of programs: `grade` runs the response's program on the tests that `problem` reads."""

from r1_grading.code.grader import equal_output, equal_result, find_program, grade
