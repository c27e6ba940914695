"""Answers that did not end by themselves."""

from megatron_r1.curation.candidate import Candidate
from megatron_r1.data.prompts import Prompt


def truncated(candidate: Candidate, prompt: Prompt) -> str:
    """Cut at a limit of tokens: whoever learns it learns not to stop."""
    return f"cut off after {candidate.length:,} tokens" if candidate.truncated else ""
