"""Shared code of rewards that request a served model.

Such a reward is one file beside this folder and one line in `rewards.REMOTE`."""
