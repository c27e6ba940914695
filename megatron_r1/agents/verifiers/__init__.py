"""Environments of `verifiers` (PyPI), which run in a Python of their own."""

from megatron_r1.agents.verifiers.verifiers_harness import VerifiersHarness, list_tasks
