"""Environments of `verifiers` (PyPI), which run unmodified in a Python of their own."""
