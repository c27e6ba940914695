"""What grading shares with the programs that use it: errors, values, child processes."""
