"""Evaluation on benchmarks, and the loop that samples and grades responses."""
