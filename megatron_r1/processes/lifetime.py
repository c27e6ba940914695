"""Processes that end with the process that started them (`r1_grading.base.lifetime`).

`python lifetime.py COMMAND …` becomes COMMAND, which does so too."""

import os
import sys

from r1_grading.base.lifetime import PARENT, die_with_parent, end_without_parent, prctl

__all__ = ["PARENT", "die_with_parent", "end_without_parent", "prctl"]

if __name__ == "__main__":
    end_without_parent()
    os.execvp(sys.argv[1], sys.argv[1:])
