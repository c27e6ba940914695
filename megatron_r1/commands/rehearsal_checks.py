"""Refuses, before a rehearsal makes its miniature, what the run at full size would refuse."""

from megatron_r1.base.errors import Cause, UserError
from megatron_r1.commands.parts.trainer_checks import check_trainer
from megatron_r1.config import Config
from megatron_r1.controller.rollouts.players import find_player
from megatron_r1.engines.server.model_config import max_model_len
from megatron_r1.engines.server.recipe_checks import check_engines
from megatron_r1.engines.server.vllm_arguments import check_arguments
from megatron_r1.models.hf_config import HFConfig
from megatron_r1.models.hf_config_file import read_hf_config
from megatron_r1.push.matching.planned_links import links_per_rank
from megatron_r1.push.matching.recipe_plan import check_pushes, engine_layout, planned_push
from megatron_r1.rehearse import null_gpu

MAX_LINKS = 100
"""Most links of a trainer rank beyond those that the numbers of ranks require. The recipe for 2,048
GPUs has 17; with links between nearly all pairs of ranks it would have 1,185."""
PAIR_REQUESTS = 4
"""Requests to the store for a pair of ranks: each sets its address and gets the other's."""
MAX_REQUESTS = 1_000_000
"""Most requests of all pairs. One store answers about 25,000 a second (`plan.assumptions`)."""


def check_full_size(config: Config, verb: str) -> None:
    """Raise UserError for what the full-size run would refuse, since its miniature may no longer
    have it.

    Args:
        config: the recipe as its verb would read it.
        verb: the subcommand of megatron-r1."""
    hf_config = read_hf_config(config.model.path, None)
    if verb in ("rl", "sample"):
        check_engines(config, hf_config)
        if not null_gpu.is_on_null_gpu():  # there the command that started this one has asked vLLM
            check_arguments(config.rollout, "rollout")
        max_model_len(config)
    if verb != "sample":
        check_trainer(config, verb)
    if verb == "rl":
        find_player(config)
        check_pushes(config, hf_config, config.parallel.processes)
        check_connections(config, hf_config)


def check_connections(config: Config, hf_config: HFConfig) -> None:
    """Refuse a push whose full size connects too many ranks, with UserError."""
    if not config.push.on_one_node:  # in shared memory a link costs nothing
        links = links_per_rank(planned_push(config, hf_config), config.parallel.processes)
        check_links(links, engine_layout(config).num_ranks)


def check_links(links: list[int], engine_ranks: int) -> None:
    """Refuse too many links between trainer ranks and engine ranks.

    Args:
        links: how many each trainer rank has to engine ranks.
        engine_ranks: the number of engine ranks.

    Raises:
        UserError: for too many links."""
    largest, pairs = max(links), sum(links)
    required = -(-engine_ranks // len(links))
    limit, requests = MAX_LINKS * required, PAIR_REQUESTS * pairs
    if largest <= limit and requests <= MAX_REQUESTS:
        return
    raise UserError(
        f"push: at full size a trainer rank would have {largest:,} links to engine ranks (at most "
        f"{limit:,}), and {pairs:,} pairs would make {requests:,} requests to one store when they "
        f"connect (at most {MAX_REQUESTS:,}); use fewer rollout.engines",
        key="rollout.engines",
        cause=Cause.TOO_LARGE,
    )
