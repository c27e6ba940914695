"""Rollout engines: vLLM servers in processes of their own, driven over HTTP.

Imports neither torch nor vllm.
"""
