"""The room in micro-batches."""

from megatron_r1.controller.trainer_calls.packing import pack


def test_a_sample_goes_to_another_micro_batch_where_the_cheapest_has_no_room():
    """The three short samples cost less than the long one, and leave no room for the last."""
    packing = pack([8, 3, 3, 3, 2], 1, 10, cost=lambda length: length**2)
    assert sorted(map(sorted, packing.shares[0])) == [[0, 4], [1, 2, 3]]
