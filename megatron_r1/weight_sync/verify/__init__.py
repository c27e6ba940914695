"""Checksums of what was sent and received."""
