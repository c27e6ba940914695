"""The results of a machine as one page."""

from collections.abc import Sequence
from typing import Any

from tools.gpu_check.runner import Outcome

NULL_GPU = "(null)"
"""A part of the name of the null GPU's devices (tests/nullgpu/shim/null_gpu.h)."""

ON_NULL_GPU = (
    "**This is the null GPU of tests/nullgpu**: kernels do not run, so times are meaningless, "
    "results are wrong, and nothing is settled."
)


def write(about: dict[str, Any], outcomes: Sequence[Outcome]) -> str:
    """Return the page in Markdown: the machine, a row per check, and the output of what failed."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    is_null = any(NULL_GPU in gpu for gpu in about["gpus"])
    lines = [
        f"# GPU check, {about['date']}",
        "",
        f"`{about['command']}`; {'; '.join(about['gpus']) or 'no GPU'}; driver and clocks: "
        f"{'; '.join(about['nvidia-smi'])}; CUDA {about['cuda']}; Python {about['python']}; "
        f"{about['processor']}.",
        "",
        versions + ".",
        "",
        *([ON_NULL_GPU, ""] if is_null else []),
        "| check | result | seconds | settles in docs/gpu-checklist.md |",
        "|---|---|---:|---|",
    ]
    for outcome in outcomes:
        result = outcome.status
        if outcome.status in ("skipped", "no time"):
            result += f": {outcome.tail[-1]}" if outcome.tail else ""
        settles = (
            "; ".join(outcome.check.settles) if outcome.status == "passed" and not is_null else ""
        )
        lines.append(f"| {outcome.check.name} | {result} | {outcome.seconds:.0f} | {settles} |")
    for outcome in outcomes:
        if outcome.status == "failed":
            check = outcome.check
            lines += ["", f"## Failed: {check.name}", "", f"`{check.command}`", "", "```"]
            lines += [*outcome.tail, "```"]
    return "\n".join(lines) + "\n"
