"""Processes: start, stop, signals, memory, and how they authenticate each other."""
