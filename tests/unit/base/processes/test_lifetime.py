"""An engine's first lines: no process of it is left when its parent has ended."""

import os
import subprocess
import sys

from liveness import is_alive, wait_until_dead

ENGINE = """
import time
from megatron_r1.base.processes import children
children.end_without_parent()
print("lives", flush=True)
time.sleep(10_000)
"""
STARTER = f"""
import os, subprocess, sys, time
engine = subprocess.Popen([sys.executable, "-c", {ENGINE!r}], stdout=subprocess.PIPE)
engine.stdout.readline()
print(engine.pid, flush=True)
time.sleep(10_000)
"""


def start(program: str, parent: int | None = None) -> subprocess.Popen:
    environment = {} if parent is None else {"MEGATRON_R1_PARENT": str(parent)}
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=os.environ | environment
    )


def test_it_lives_while_its_parent_does():
    with start(ENGINE, os.getpid()) as process:
        assert process.stdout.readline() == b"lives\n"
        process.kill()


def test_it_ends_where_its_parent_ended_before_it_could_ask_to_end_with_it():
    gone = subprocess.Popen(["true"])
    gone.wait()
    with start(ENGINE, gone.pid) as process:
        assert (process.stdout.read(), process.wait()) == (b"", 1)


def test_it_ends_with_a_parent_that_is_killed():
    with start(STARTER) as starter:
        engine = int(starter.stdout.readline())
        assert is_alive(engine)
        starter.kill()
    assert wait_until_dead(engine)
