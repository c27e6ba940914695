"""The table of transports: its names of classes and of rates are those of the modules it names."""

import pytest

from megatron_r1.base.transports import ACROSS_NODES, TRANSPORTS
from megatron_r1.config.push import PushConfig
from megatron_r1.plan.hardware import HARDWARE
from megatron_r1.push.transports import receiver_class, sender_class
from megatron_r1.push.transports.base import Receiver, Sender


@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_row_names_both_ends_and_a_rate_of_the_hardware(name):
    assert issubclass(receiver_class(name), Receiver) and issubclass(sender_class(name), Sender)
    assert getattr(HARDWARE["H100"], TRANSPORTS[name].rate) > 0
    assert PushConfig(transport=name).on_one_node == TRANSPORTS[name].is_single_node


def test_substitutes_reach_as_far_and_need_no_gpu():
    for transport in TRANSPORTS.values():
        assert transport.needs_gpu == bool(transport.without_gpu)
        if transport.without_gpu:
            substitute = TRANSPORTS[transport.without_gpu]
            assert (
                not substitute.needs_gpu and substitute.is_single_node == transport.is_single_node
            )
    assert not TRANSPORTS[ACROSS_NODES].is_single_node
