"""Reward worker processes and the pool that grades with them."""
