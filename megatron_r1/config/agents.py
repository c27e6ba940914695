"""Section `agents`: episodes of several turns, with their environments and limits."""

from typing import Any, Literal

from pydantic import Field

from megatron_r1.config.section import Resumable, Section


class VerifiersConfig(Section):
    """An environment of the package verifiers, which runs in a Python of its own."""

    python: str = ".venv-agents/bin/python"
    """the Python that has verifiers; in a checkout `make agents` makes this one"""
    taskset: str = ""
    """id of the taskset, a module that this Python can import"""
    taskset_options: dict[str, Any] = Field(default_factory=dict)
    """further fields of verifiers' TasksetConfig"""
    harness: str = ""
    """id of the harness; default: the taskset's own"""
    harness_options: dict[str, Any] = Field(default_factory=dict)
    """further fields of verifiers' HarnessConfig"""
    environment_options: dict[str, Any] = Field(default_factory=dict)
    """further fields of verifiers' EnvConfig, such as id"""
    workers: int = Field(1, ge=1)
    """processes of verifiers' environment server"""
    client: Literal["chat", "tokens"] = "chat"
    """chat: the gateway renders; tokens: verifiers' renderers do, and its trace must have the
    gateway's tokens"""
    renderer: dict[str, Any] | None = None
    """verifiers' RendererConfig, for client tokens"""


class AgentsConfig(Section):
    """Episodes of several turns in an environment; without one, a response is a single turn."""

    environment: str = ""
    """a class of your own, module:Class, or calculator, gym, lookup, python, retrieval; see
    docs/agents.md"""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """arguments of the environment's class, the same for all episodes"""
    system: str = ""
    """system message that begins every episode"""
    harness: str | list[str] = ""
    """instead of an environment, an agent that calls the gateway: module:function, or a command.
    See docs/gateway.md"""
    verifiers: VerifiersConfig = VerifiersConfig()
    """instead of either: tasks, harness and reward of a verifiers environment"""
    tool_parser: str = "auto"
    """how tool calls are written: a tool parser of vLLM's, such as qwen3_coder, or none; auto,
    hermes: JSON between <tool_call> tags, read without vLLM"""
    reasoning_parser: str | None = None
    """a reasoning parser of vLLM's; null: what precedes </think>, with auto and hermes"""
    parser_workers: int = Field(2, ge=1)
    """processes with vLLM's parsers, if any"""
    sampling_options: Literal["run", "refuse"] = "run"
    """sampling options of an agent's requests that are not the run's: replaced, or refused"""
    harness_processes: int = Field(32, ge=1)
    """commands of agents.harness at once"""
    gateway_host: str = "127.0.0.1"
    """the address that the gateway listens on: loopback, or the run's own network"""
    environment_processes: Resumable[int] = Field(512, ge=1)
    """environments at once; further episodes wait for one"""
    max_turns: int = Field(16, ge=1)
    """turns of the policy in an episode"""
    call_seconds: float = Field(30.0, gt=0)
    """wall time of one call of a tool"""
    timeout_seconds: float = Field(600.0, gt=0)
    """time of an episode without that of the engines; what exceeds it ends as agent_timeout"""
    max_result_chars: int = Field(20_000, ge=1)
    """a tool's longer result is cut off"""

    @property
    def player_settings(self) -> dict[str, str | list[str]]:
        """The settings that name what plays the episodes, by key; empty for single turns.

        A run has one of them at most."""
        players = {
            "agents.environment": self.environment,
            "agents.harness": self.harness,
            "agents.verifiers.taskset": self.verifiers.taskset,
        }
        return {key: value for key, value in players.items() if value}
