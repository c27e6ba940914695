"""Tokens that MTP layers predict, shifted at once, against Megatron's loop over samples."""

from pathlib import Path

import pytest
from ranks import run_ranks


@pytest.mark.more
@pytest.mark.parametrize("context", [1, 2, 3])
def test_equal_to_megatron_s_on_every_context_rank(context):
    run_ranks(Path(__file__).parent, context, "shifted_tokens.py")
