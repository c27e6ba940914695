"""Sizes of the buckets in which transports move a push."""

RELAY_BUCKET_BYTES = 64 << 20
"""A bucket that an engine rank relays; in a round of relays each engine of the set has one."""
ROUNDS_AHEAD = 2
"""Rounds of NCCL that a GPU has enqueued at a time, each with a bucket for either direction."""
