import resource
import subprocess
import sys

import pytest
from refusals import refused

from megatron_r1.base.errors import Cause
from megatron_r1.base.processes.open_files import allow_open_files


@pytest.mark.parametrize(("soft", "needed", "after"), [(300, 400, 400), (300, 200, 300)])
def test_the_limit_rises_where_it_must_and_never_falls(soft, needed, after):
    # In a process of its own: this one may have more files open than that.
    code = (
        "import resource as r, sys\n"
        "from megatron_r1.base.processes.open_files import allow_open_files\n"
        "soft, needed = map(int, sys.argv[1:])\n"
        "r.setrlimit(r.RLIMIT_NOFILE, (soft, r.getrlimit(r.RLIMIT_NOFILE)[1]))\n"
        "allow_open_files(needed, '4 ranks'); print(r.getrlimit(r.RLIMIT_NOFILE)[0])"
    )
    command = [sys.executable, "-c", code, str(soft), str(needed)]
    assert int(subprocess.check_output(command, text=True)) == after


def test_too_low_a_hard_limit_is_named(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 1024))
    with refused("ulimit -n", Cause.TOO_LARGE, "2,048 ranks", "5,120", "1,024"):
        allow_open_files(5120, "2,048 ranks")
