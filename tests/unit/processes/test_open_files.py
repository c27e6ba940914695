import resource

import pytest
from refusals import refused

from megatron_r1.errors import Cause
from megatron_r1.processes.open_files import allow_open_files


@pytest.fixture
def limits():
    """Sets the soft limit for a test."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda soft: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(("soft", "needed", "after"), [(300, 400, 400), (300, 200, 300)])
def test_the_limit_rises_where_it_must_and_never_falls(limits, soft, needed, after):
    limits(soft)
    allow_open_files(needed, "4 ranks")
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == after


def test_too_low_a_hard_limit_is_named(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 1024))
    with refused("ulimit -n", Cause.TOO_LARGE, "2,048 ranks", "5,120", "1,024"):
        allow_open_files(5120, "2,048 ranks")
