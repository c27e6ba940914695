"""Watches a run from its controller: progress, health, diagnosis of hangs, restarts."""
