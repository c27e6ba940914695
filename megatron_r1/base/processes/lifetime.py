"""Processes that end with the process that started them: `r1_grading.base.lifetime`."""

from r1_grading.base.lifetime import PARENT, die_with_parent, end_without_parent, prctl

__all__ = ["PARENT", "die_with_parent", "end_without_parent", "prctl"]
