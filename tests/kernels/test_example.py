"""The kernels alone: no other part of the stack is needed, or even imported."""

from pathlib import Path

import pytest
from ranks import run_script

KERNELS = Path(__file__).parents[2] / "kernels"

RUN = """
import runpy, sys
runpy.run_path("example.py")
others = {name.partition(".")[0] for name in sys.modules}
print("imported", sorted(others & {"megatron_r1", "megatron", "vllm", "transformers"}))
"""


@pytest.mark.more
def test_the_example_runs_without_the_rest_of_the_stack():
    output = run_script(KERNELS, ["-c", RUN])
    assert "no 1000 x 5000 logits" in output and "imported []" in output
