"""The controller calls trainer ranks by methods of protocols; a rank runs what arrives."""

import msgspec
import pytest

from megatron_r1.config.engine_mask import EngineMaskSettings
from megatron_r1.config.loss_settings import TokenAdvantageSettings
from megatron_r1.push.control_messages import EngineSetFailure, SentWeights
from megatron_r1.push.matching import EngineLayout
from megatron_r1.trainer.operations import (
    CheckpointOperations,
    EvaluationOperations,
    ModelOperations,
    PushOperations,
    decode_result,
    operation_names,
)
from megatron_r1.trainer.rank_messages import RankCall
from megatron_r1.trainer.rank_server import RankServer, argument_types, operations_by_name
from megatron_r1.trainer.training_sample import Sample

PROTOCOLS = (ModelOperations, EvaluationOperations, CheckpointOperations, PushOperations)
FAILED = SentWeights({"one": EngineSetFailure("cut", [1])})


class Rank(*PROTOCOLS):
    """A rank whose methods return their arguments, but `send_weights`."""

    def probe(self, **arguments):
        return arguments

    def compute_token_advantages(self, **arguments):
        return arguments

    def mask_advantages(self, **arguments):
        return arguments

    def connect_sets(self, **arguments):
        return arguments

    def send_weights(self):
        return FAILED


def run_at_rank(operation, arguments):
    """Return the result of `operation` at a rank that the call has reached over the wire."""
    rank, server = Rank(), RankServer.__new__(RankServer)
    server._operations = operations_by_name(rank, rank, rank, rank)
    server._types = argument_types()
    sent = msgspec.msgpack.encode(RankCall(operation, arguments))
    return server.run(msgspec.msgpack.decode(sent, type=RankCall))


def test_a_rank_runs_every_operation_of_the_protocols():
    rank = Rank()
    operations = operations_by_name(rank, rank, rank, rank)
    assert operations.keys() == set().union(*map(operation_names, PROTOCOLS))
    assert run_at_rank("refresh_reference", {}) == {}


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        (EvaluationOperations.probe, {"samples": [Sample.pack([1, 2], [3], [-0.5])]}),
        (
            ModelOperations.compute_token_advantages,
            {
                "function": "module:function",
                "settings": TokenAdvantageSettings(0.1, 1.0, 0.95, "group", 1e-6),
            },
        ),
        (
            ModelOperations.mask_advantages,
            {
                "function": "module:function",
                "settings": EngineMaskSettings("sequence", 0.999, 1.001),
            },
        ),
        (
            PushOperations.connect_sets,
            {"sets": [("one", 2)], "layout": EngineLayout(tensor_parallel=2)},
        ),
    ],
)
def test_arguments_arrive_with_their_types(operation, arguments):
    assert run_at_rank(operation.__name__, arguments) == arguments


def test_an_operation_that_no_protocol_has_is_refused():
    with pytest.raises(ValueError, match="refresh_reference"):
        run_at_rank("describe", {})


def test_an_argument_of_another_form_is_refused_by_its_name():
    layout = {"tensor_parallel": 2, "engine_parallel": 2}
    with pytest.raises(ValueError, match="connect_sets, argument layout: .*`engine_parallel`"):
        run_at_rank("connect_sets", {"layout": layout})


def test_the_controller_gets_a_result_as_it_left_the_rank():
    sent = run_at_rank("send_weights", {})
    assert sent == {"failures": {"one": {"error": "cut", "members": [1], "is_damaged": False}}}
    assert decode_result(PushOperations.send_weights, 0, sent) == FAILED
