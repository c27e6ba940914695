"""Benches of `r1_kernels`. `supervisor` is `python tools/bench kernels`: its `worker` measures the
`cases`, each with every one of `implementations`. `sweep` times block sizes instead; `resources`
(`python tools/bench resources`) reads the compiled kernels without a GPU."""
