"""Benches of the rewards: their rates and a soak through the worker pool, which are
`python tools/bench rewards`, and the labelled responses that they grade (`samples`)."""
