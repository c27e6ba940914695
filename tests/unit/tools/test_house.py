import subprocess
from pathlib import Path
from types import CodeType

import pytest

from tools.house.structure import (
    PACKAGES,
    closure,
    modules,
    num_modules,
    num_words,
    package_imports,
)
from tools.house.walks import SAMPLER_START, WALKS, Walk, trace_run, walk_files

ROOT = Path(__file__).resolve().parents[3]
FILES = {
    "megatron_r1/__init__.py": "",
    "megatron_r1/low/__init__.py": "",
    "megatron_r1/low/base.py": "import os",
    "megatron_r1/high/__init__.py": "from megatron_r1.high.start import run",
    "megatron_r1/high/start.py": (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from megatron_r1.low import types\n"
        "def run():\n    from megatron_r1.low.base import name\n"
    ),
    "megatron_r1/low/types.py": "",
    "kernels/r1_kernels/__init__.py": "",
    "README.md": "two words\n```\nnot these three\n```\n",
    "CONTRIBUTING.md": "one",
}


@pytest.fixture
def root(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_what_a_module_can_import_has_its_packages_and_functions_not_annotations(root):
    known = modules(root)
    assert closure(known, ("megatron_r1.high.start",)) == {
        "megatron_r1",
        "megatron_r1.high",
        "megatron_r1.high.start",
        "megatron_r1.low",
        "megatron_r1.low.base",
    }
    assert package_imports(known) == {("high", "low"): 1}
    assert num_words(root) == 8  # as `wc -w`, which counts fences
    assert num_words(root, with_code_blocks=False) == 3


def test_tracked_modules_outside_tests_are_counted(root):
    (root / "tests").mkdir()
    (root / "tests" / "test_low.py").write_text("")
    subprocess.run(["git", "init", "-q", root], check=True)
    subprocess.run(["git", "add", "."], cwd=root, check=True)
    (root / "untracked.py").write_text("")
    assert num_modules(root) == sum(name.endswith(".py") for name in FILES)


PROGRAM = {
    "start.py": """
import asyncio
from megatron_r1 import flow
def ready(): pass
flow.log_all(["before the run"])
ready()
asyncio.run(flow.main())
""",
    "flow.py": """
import asyncio
from dataclasses import dataclass
from megatron_r1 import grader, loss, make, record, stream, ticker
@dataclass
class Graded:
    response: object
    grade: float
def log_all(things): [record.note(thing) for thing in things]
async def sample(number):
    await asyncio.sleep(0)
    response = make.read(number)
    record.note(response)
    await asyncio.to_thread(lambda: record.copy(response))
    return Graded(response, await grader.grade(response))
async def main():
    other = asyncio.create_task(ticker.tick())
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(stream.sampled(sample, number)) for number in range(2)]
    await other
    graded = [stream.taken(task).graded for task in running]
    loss.loss(await asyncio.to_thread(loss.batch, graded), None)
""",
    "stream.py": """
from dataclasses import dataclass
@dataclass
class Step:
    graded: object
async def sampled(sample, number): return Step(await sample(number))
def taken(task): return task.result()
""",
    "make.py": "from megatron_r1 import parse\ndef read(n): return parse.parse(n)",
    "parse.py": "def parse(n): return [[n, 5, 6]]",
    "grader.py": "from megatron_r1 import verdict\nasync def grade(r): return verdict.judge(r)",
    "verdict.py": "def judge(r): return float(len(r)) / 3",
    "record.py": "from megatron_r1 import metrics\n"
    "def note(r): metrics.count(r)\ndef copy(r): return metrics.count(r)",
    "metrics.py": "def count(r): return list(r)",
    "ticker.py": "import asyncio\nasync def tick(): await asyncio.sleep(0)",
    "loss.py": "from megatron_r1 import checks\ndef batch(all): return [x.response for x in all]\n"
    "def loss(b, head): checks.check(b)",
    "checks.py": "def check(b): pass",
    "__init__.py": "",
}


@pytest.fixture
def entered(tmp_path):
    def run(walk):
        for name, text in PROGRAM.items():
            path = tmp_path / "megatron_r1" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return trace_run(tmp_path, tmp_path, ["-m", "megatron_r1.start"], [walk], "start.py ready")

    return run


def test_a_walk_has_what_hands_the_thing_on_and_not_what_records_it(entered):
    walk = Walk(
        *("a response", "make.py read", "loss.py loss", ["make.py read"], []),
        follows=True,
        outside=["grader.py grade"],
    )
    names = [
        "parse",
        "flow",
        "make",
        "stream",
        "loss",
    ]  # not record, metrics, ticker, grader, checks
    found = walk_files(entered(walk), walk, "start.py ready")
    assert sorted(found) == sorted(f"megatron_r1/{name}.py" for name in names)


def test_a_walk_follows_what_is_made_from_an_argument(entered):
    walk = Walk("a grade", "grader.py grade", "loss.py batch", [], ["grader.py grade"], True)
    names = ["flow", "grader", "verdict", "stream", "loss"]
    found = walk_files(entered(walk), walk, "start.py ready")
    assert sorted(found) == sorted(f"megatron_r1/{name}.py" for name in names)


def test_a_walk_by_calls_has_all_that_is_called_within_and_in_tasks_that_begin_there(entered):
    walk = Walk("a run", "flow.py main", "checks.py check", ["flow.py main"], [], False)
    found = walk_files(entered(walk), walk, "start.py ready")
    names = set(PROGRAM) - {"__init__.py"}  # start.py: the direct caller is asyncio.run
    assert set(found) == {f"megatron_r1/{name}" for name in names - {"start.py"}}


def test_a_walk_has_each_file_once_from_its_first_begin_to_the_next_end():
    walk = Walk("w", "a begin", "d end", [], [], True)
    notes = [
        ("w", "x", "early"),
        ("mark", "a", "begin"),  # before `after`
        ("mark", "s", "after"),
        ("w", "y", "early"),
        ("mark", "a", "begin"),
        ("w", "a", "begin"),
        ("w", "b", "one"),
        ("other", "c", "one"),
        ("w", "b", "two"),
        ("mark", "d", "end"),
        ("w", "e", "late"),
    ]
    entered = [(time, *note) for time, note in enumerate(notes)]
    assert walk_files(entered, walk, "s after") == ["a", "b"]
    with pytest.raises(ValueError, match="d end"):
        walk_files(entered[:-2], walk, "s after")


def test_the_walks_name_functions_that_exist():
    def qualified_names(code):
        yield code.co_qualname
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from qualified_names(constant)

    functions = [
        f"{file} {name}"
        for package in PACKAGES
        for file in (ROOT / package).rglob("*.py")
        for name in qualified_names(compile(file.read_text(encoding="utf-8"), file, "exec"))
    ]
    calls = {SAMPLER_START}
    for walk in WALKS:
        calls |= {walk.begin, walk.end, *walk.within, *walk.receivers, *walk.hands_over}
    assert [call for call in calls if not any(f.endswith(call) for f in functions)] == []
