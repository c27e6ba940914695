from megatron_r1.models.gradients import embedding_ranks


def test_the_embedding_is_kept_equal_on_the_first_rank_and_where_mtp_layers_are():
    assert embedding_ranks(None, [3]) == [3]
    assert embedding_ranks(None, [0, 4, 8, 12]) == [0, 12]
    assert embedding_ranks("Et|tt|t|mL", [0, 4, 8, 12]) == [0, 12]
    # Apart from the head, whose rank must not be taken for one with a copy.
    assert embedding_ranks("Et|tt|m|L", [0, 4, 8, 12]) == [0, 8]
    # The third of four chunks is the first rank's second, the fourth the second rank's.
    assert embedding_ranks("Et|tt|t|mL", [1, 5]) == [1, 5]
