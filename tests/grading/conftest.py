"""Puts this folder on the path for `code_answers`, which several folders of tests use."""
