"""The process that measures: reads its task from stdin, writes one JSON object per line to stdout.

{"case": name, "doing": what} before every step, which tells the supervisor what a silent or dead
worker was doing; {"case": name, "result": ...} after each case; {"case": name, "broken": why}
before it ends because the device no longer works. What peers print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

# Twenty implementations share one allocator: without this, fragments of one leave too little room
# for the next. Read when torch first allocates.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch  # noqa: E402

from tools.bench.kernels.case_run import Broken, CaseRun  # noqa: E402
from tools.bench.kernels.cases import BY_NAME, Case  # noqa: E402
from tools.bench.kernels.implementation import TOO_LATE, why  # noqa: E402
from tools.bench.kernels.sizes import Sizes  # noqa: E402


def main() -> None:
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    task = json.load(sys.stdin)
    device, cases = torch.device(task["device"]), [BY_NAME[name] for name in task["cases"]]
    for index, case in enumerate(cases):

        def report(case: Case = case, **what: Any) -> None:
            lines.write(json.dumps({"case": case.name, **what}) + "\n")

        now = time.time()
        share = case.weight / sum(each.weight for each in cases[index:])
        until = now + share * max(0.0, task["deadline"] - now)
        skip = task["skip"].get(case.name, {})
        if now > task["deadline"]:
            report(result={"failed": TOO_LATE})
            continue
        try:
            sizes = Sizes(**task["sizes"])
            result = CaseRun(case, sizes, device, until, skip, report).run(task["repeats"])
        except Broken as broken:
            report(broken=str(broken))
            sys.exit(1)
        except Exception as error:  # the inputs did not fit: the other cases may
            result = {"failed": why(error)}
        report(result=result)
    lines.write(json.dumps({"done": True}) + "\n")


if __name__ == "__main__":
    main()
