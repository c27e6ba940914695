"""A preflight of ranks that are nodes of their own: `preflight_ranks.py OUT`.

Planted faults: node 1 has another run folder, rank 2 reports a low rate of matrix products, which
does not depend on the machine's load, and node 3 reports another version of torch."""

import os
import socket
import sys

from megatron_r1.base.errors import RunError
from megatron_r1.config import parse_recipe
from megatron_r1.rehearse.preflight import findings, folder, node_probes, rank
from megatron_r1.rehearse.settings import PreflightConfig


def main() -> None:
    (out,) = sys.argv[1:]
    number = os.environ["RANK"]
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    socket.gethostname = lambda: f"node-{number}"
    own = "-own" if number == "1" else ""
    folder.APPEAR_SECONDS, folder.NUM_BYTES = 1.0, 1 << 20
    parallel = {"tensor": 2, "expert": 2, "threads": 1}
    run, push = {"folder": f"{out}/run{own}"}, {"transport": "gloo"}
    config = parse_recipe({"run": run, "parallel": parallel, "push": push})
    # Ranks that share two cores are slow at random.
    settings = PreflightConfig(
        slowest=0.01, output=f"{out}/found.json", calibration=f"{out}/rates.yaml"
    )
    product_rate, versions = rank.product_rate, node_probes.node_versions
    if number == "2":
        rank.product_rate = lambda: product_rate() / 1e6
    if number == "3":
        node_probes.node_versions = lambda: versions() | {"torch": "1.0"}
    facts = rank.run(config, settings)
    if facts:
        try:
            found = findings.preflight_results(config, settings, facts)
            findings.write_preflight_report("small", settings, facts, found)
        except RunError as error:
            print(f"blocked: {error}")


if __name__ == "__main__":
    main()
