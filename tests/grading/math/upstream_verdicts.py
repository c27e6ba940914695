"""`python tests/grading/math/upstream_verdicts.py FOLDER`: math-verify's cases graded by us.

FOLDER is its unpacked sdist (pip download math-verify==0.9.0 --no-deps --no-binary :all:), which
ships the tests; the installed package does not. Prints each case whose verdict differs, and counts.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from r1_grading.math import grade

MODULES = ("test_all", "test_strict", "test_boxed", "test_open_thoughts", "test_numina_cases")


def cases(folder: Path) -> Iterator[tuple[str, dict]]:
    """Every parametrized case with a gold and a predicted answer: its test, its arguments."""
    (folder / "tests" / "__init__.py").touch()  # they import each other as a package
    sys.path.insert(0, str(folder))
    for name in (*MODULES, "test_yujianll"):
        module = importlib.import_module(f"tests.{name}")
        for test, function in vars(module).items():
            for mark in getattr(function, "pytestmark", ()):
                names = [part.strip() for part in mark.args[0].split(",")]
                if {"gold", "pred"} <= set(names):
                    for values in mark.args[1]:
                        yield f"{name}::{test}", dict(zip(names, values, strict=True))


def main(folder: Path) -> None:
    num_cases = num_same = 0
    for test, case in cases(folder):
        expected = case.get("expected", case.get("result"))
        verdict = grade(case["pred"], case["gold"])
        num_cases += 1
        num_same += verdict.reward == expected
        if verdict.reward != expected:
            print(f"{test}: {expected} upstream, {case['gold'][-60:]!r} / {case['pred'][-80:]!r}")
            print(f"    {verdict.reason}")
    print(f"{num_same} of {num_cases} verdicts as upstream")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
