"""Reinforcement learning: advantages, policy losses, rollouts, and the loop that joins them."""
