"""What the pipeline of test_pipeline_run.py learns from: a function that makes it."""

import json
from pathlib import Path


def write(folder: Path, *, digits: int) -> None:
    """Sums of two digits below `digits`, as supervised examples."""
    examples = [
        {"prompt": f"{a}+{b}=", "response": f"<think></think><answer>{a + b}</answer>"}
        for a in range(digits)
        for b in range(digits)
    ]
    (folder / "sft.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in examples))
