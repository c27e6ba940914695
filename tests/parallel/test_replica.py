import json
from pathlib import Path

from ranks import run_ranks

HERE = Path(__file__).parent


def test_a_share_sent_to_one_rank_of_a_replica_reaches_all_of_it_and_no_other(tmp_path):
    leaders = {"1x1": 4, "2x1": 2, "1x2": 2, "2x2": 1}
    run_ranks(HERE, 4, "replica_shares.py", str(tmp_path), *leaders)
    for grid, num_replicas in leaders.items():
        ranks = json.loads((tmp_path / f"{grid}.json").read_text())
        assert sum(leads for _, leads, _ in ranks) == num_replicas
        assert {data for data, _, _ in ranks} == set(range(num_replicas))
        for data_rank, _, got in ranks:
            assert got == [f"share of replica {data_rank}", ""], grid
