"""The bench of `megatron-r1 why`: cases and their models, their runs, what `why` says of each, and
the results, which are `python tools/bench why`."""
