"""Benches of `r1_kernels`. `command` is `python tools/bench kernels`: the `worker` of its
`supervisor` measures the `cases`, each with every one of `implementations`. `sweep` times block
sizes instead; `resources` (`python tools/bench resources`) reads the compiled kernels without a
GPU."""
