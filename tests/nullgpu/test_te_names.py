"""Names and shapes of Transformer Engine's parameters against the weight tables, on every grid."""

import json

GRIDS = [
    *("one", "tp2", "pp2", "pp2xvp2", "pp2xuneven", "ep2", "cp2", "tp2xetp2", "tp2xep2"),
    *("tp2xpp2", "ep2xetp2", "pp4xapart", "pp2xvp2xtp2"),
]


def test_every_rank_of_every_grid_builds_what_the_weight_tables_say(on_null_gpu):
    printed = on_null_gpu("transformer_engine_names.py", *GRIDS)
    found = json.loads(printed.splitlines()[-1])
    assert not found["wrong"]
    assert found["compared"] >= 150
