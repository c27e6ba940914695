"""Reasoning and tool calls in sampled text, found by vLLM's parsers in worker processes."""

from megatron_r1.agents.parsing.choice import Parser, parser_of
from megatron_r1.agents.parsing.pool import Parsed, ParserPool
from megatron_r1.agents.parsing.worker import ParseJob
