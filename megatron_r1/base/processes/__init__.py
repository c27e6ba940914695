"""Processes: start, stop, signals, memory, logs, and how they authenticate each other."""
