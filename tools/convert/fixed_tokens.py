"""The tokens both sides of the reload check are asked about."""

import torch


def fixed_tokens(vocabulary: int) -> torch.Tensor:
    """(2, 48) token ids that are spread over the vocabulary."""
    return (torch.arange(96).view(2, 48) * 7919 + 13) % vocabulary
