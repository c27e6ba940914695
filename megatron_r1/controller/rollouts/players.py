"""What plays the episodes of a run, an environment's player or an agent: found, checked before the
run starts, and made.

Only a run whose recipe names one (`AgentsConfig.player_settings`) imports this module, and with it
`megatron_r1.agents`."""

import sys

from megatron_r1.agents.continuation import Continuation
from megatron_r1.agents.environment import check_parameters
from megatron_r1.agents.environment_pool import EnvironmentPool, describe_in_subprocess
from megatron_r1.agents.gateway import Gateway
from megatron_r1.agents.harness import AgentFunction, HarnessPlayer, find_harness
from megatron_r1.agents.player import EpisodePlayer
from megatron_r1.agents.turn_parsing import find_parser
from megatron_r1.agents.verifiers import VerifiersHarness
from megatron_r1.base.errors import Cause, UserError
from megatron_r1.config import Config
from megatron_r1.data.prompt_tokenizer import PromptTokenizer
from megatron_r1.engines.episodes import Player
from megatron_r1.engines.server.model_config import max_model_len

ANY_TOOL = {"type": "function", "function": {"name": "tool", "parameters": {"type": "object"}}}
"""Stands for the tools of an agent, which are known only when it runs."""


def find_player(config: Config) -> tuple[str, str | list[str]] | None:
    """Return the key and value of the setting that names what plays the episodes; None where
    responses are single turns.

    Raises:
        UserError: two of them, another template, or code that cannot be imported.
    """
    agents = config.agents
    settings = agents.player_settings
    if not settings:
        return None
    if len(settings) > 1:
        players = " and ".join(f"{key}: {value}" for key, value in settings.items())
        raise UserError(
            f"{players} each play the episodes; leave one out",
            key=next(iter(settings)),
            cause=Cause.CONFLICT,
        )
    [(key, player)] = settings.items()
    if config.data.template != "chat":
        raise UserError(
            f"data.template: {config.data.template!r} renders one question; {key} needs "
            "the tokenizer's own chat template: set data.template: chat",
            key="data.template",
            cause=Cause.CONFLICT,
        )
    if agents.environment:
        description = describe_in_subprocess(agents.environment)
        check_parameters(agents.environment, description, agents.parameters)
    elif agents.harness:
        find_harness(agents)
    return key, player


def check_player(config: Config, tokenizer: PromptTokenizer) -> None:
    """Check section `agents`; print the environment's tools and how the chat template continues a
    conversation.

    Raises:
        UserError: two settings name a player, its template or code cannot be used, or the chat
            template refuses the results of tools.
    """
    if find_player(config) is None:
        return
    agents = config.agents
    tools = [ANY_TOOL]
    template = Continuation(tokenizer.hf_tokenizer, tokenizer.end_tokens)
    if agents.environment:
        description = describe_in_subprocess(agents.environment)
        tools = description.tools
        print(f"tools: {description.list_tools()}")
        if not template.renders_tools(tools):
            print(
                f"the chat template of {config.model.path} shows no tools to the model; "
                + (
                    "agents.system must describe them"
                    if agents.system
                    else "show worked calls in agents.system, as examples/smollm2/python_tool.yaml"
                ),
                file=sys.stderr,
            )
    verdicts = template.probe(tools)
    for case, verdict in verdicts.items():
        print(f"chat template, {case}: {verdict}")
    if agents.environment and "refused" in verdicts.values():
        raise UserError(
            f"model.path: the chat template of {config.model.path} refuses the results of tools; "
            "give the tokenizer one that has role tool",
            key="model.path",
            cause=Cause.UNSUPPORTED,
        )


def make_player(config: Config, tokenizer: PromptTokenizer) -> Player:
    """Return the player of the run's episodes; the recipe names one."""
    agents, rollout, max_length = config.agents, config.rollout, max_model_len(config)
    path = tokenizer.hf_tokenizer.name_or_path
    if agents.environment:
        environments = EnvironmentPool(agents, describe_in_subprocess(agents.environment))
        return EpisodePlayer(tokenizer, environments, agents, max_length)
    run: AgentFunction = VerifiersHarness(agents.verifiers, path)
    if agents.harness:
        run = find_harness(agents)
    parsers = find_parser(agents, path)
    options = agents.sampling_options
    gateway = Gateway(tokenizer, parsers, host=agents.gateway_host, sampling_options=options)
    return HarnessPlayer(
        tokenizer,
        gateway,
        parsers,
        run,
        max_turns=agents.max_turns,
        timeout_seconds=agents.timeout_seconds,
        max_model_len=max_length,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
    )
