"""What only the recipe's full size shows of its push: how many ranks it connects to each other."""

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.push.plan.engine_sets import num_links
from megatron_r1.push.plan.recipe import engine_layout, planned_push

MAX_LINKS = 100
"""Most links of a trainer rank beyond those that the numbers of ranks require. The recipe for 2,048
GPUs has 17; with links between nearly all pairs of ranks it would have 1,185."""
PAIR_REQUESTS = 4
"""Requests to the store for a pair of ranks: each sets its address and gets the other's."""
MAX_REQUESTS = 1_000_000
"""Most requests of all pairs. One store answers about 25,000 a second (`config.hardware`)."""


def check_connections(config: Config, hf: dict) -> None:
    """Refuse a push whose full size connects too many ranks, with UserError."""
    if not config.push.on_one_host:  # in shared memory a link costs nothing
        links = num_links(planned_push(config, hf), config.parallel.processes)
        check_links(links, engine_layout(config).num_ranks)


def check_links(links: list[int], engine_ranks: int) -> None:
    """Raise UserError for too many links. links: how many each trainer rank has to engine ranks."""
    most, pairs = max(links), sum(links)
    required = -(-engine_ranks // len(links))
    limit, requests = MAX_LINKS * required, PAIR_REQUESTS * pairs
    if most <= limit and requests <= MAX_REQUESTS:
        return
    raise UserError(
        f"push: at full size a trainer rank would have {most:,} links to engine ranks (at most "
        f"{limit:,}), and {pairs:,} pairs would make {requests:,} requests to one store when they "
        f"connect (at most {MAX_REQUESTS:,}); use fewer rollout.engines",
        key="rollout.engines",
        cause=Cause.TOO_LARGE,
    )
