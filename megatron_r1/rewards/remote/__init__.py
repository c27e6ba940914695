"""Shared code of rewards that request a served model.

Such a reward is one file next to this folder and one line in `rewards.REMOTE`."""
