"""Responses that did not end by themselves."""

from megatron_r1.data.prompts import Prompt
from megatron_r1.evaluation.response import TextResponse


def truncated(response: TextResponse, prompt: Prompt) -> str:
    """Drop a response that was cut at the token limit: a model trained on it learns not to stop."""
    return f"cut off after {response.length:,} tokens" if response.truncated else ""
