"""The reward `code`: the response's program is run on tests.

`accuracy` grades, `program_text` finds the program, `problem` reads the tests and `asserts` those
that are Python; `outputs` and `checker` judge what the program printed."""

from r1_grading.code.accuracy import grade
