"""Rewards of served models: their settings, client, judge and reward model."""

from r1_grading.remote.settings import ServiceSettings, read_settings
