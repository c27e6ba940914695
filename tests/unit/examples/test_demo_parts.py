import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
MODULE = """import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
print("running", flush=True)
signal.sigwait({signal.SIGTERM})
print("stopped after its step", flush=True)
sys.exit(3)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_that_ends_a_demo_ends_the_part_that_runs(tmp_path, number):
    (tmp_path / "part.py").write_text(MODULE)
    program = "from examples.demo_parts import python; python('part')"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    demo = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert demo.stdout.readline() == "running\n"
    demo.send_signal(number)
    assert demo.stdout.read() == "stopped after its step\n", "read until both have ended"
    assert demo.wait() == (3 if number == signal.SIGTERM else -signal.SIGKILL)
