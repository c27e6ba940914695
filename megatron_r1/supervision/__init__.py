"""Watches a run from within its controller: what it waits for, how it is, what can be mended."""
