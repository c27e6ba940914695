"""What ranks learn from the store when others are late or dead."""

import pytest
from torch.distributed import DistStoreError, HashStore

from megatron_r1.push import rendezvous
from megatron_r1.push.rendezvous import Rendezvous, TrainerRendezvous


@pytest.fixture
def at_check(monkeypatch):
    """What happens after a number of checks for answers, by that number; checks take no time."""
    happens, checks = {}, []

    def sleep(_):
        checks.append(1)
        happens.get(len(checks), lambda: None)()

    monkeypatch.setattr(rendezvous.time, "sleep", sleep)
    return happens


NAMES = ["0/1", "1/1", "2/1"]


def test_an_engine_rank_that_answers_late_is_not_taken_for_dead(at_check):
    """Each publish_alive comes just before the checks that the one before has left are over."""
    met = Rendezvous(HashStore(), "set", 1.0)
    most = rendezvous.ANSWER_CHECKS
    for number, name in enumerate(NAMES):
        at_check[(number + 1) * (most - 1)] = lambda name=name: met.publish_alive(name, 4)
    failure = met.diagnose_failure(NAMES, 4, "cut")
    assert (failure.error, failure.members) == ("cut", [])


def test_those_that_do_not_answer_are_named(at_check):
    met = Rendezvous(HashStore(), "set", 1.0)
    met.publish_alive("1/1", 4)
    failure = met.diagnose_failure(NAMES, 4, "cut")
    assert failure.members == [0, 2] and "rank 1 of engine 2" in failure.error
    assert met.diagnose_failure(NAMES, 4, "another") == failure  # the first is kept


def test_an_engine_that_offers_nothing_is_named():
    with pytest.raises(DistStoreError, match=r"set\.1.*receiver/0"):
        TrainerRendezvous(HashStore(), "set", 0.0, member=1).read_receivers(1)
