"""Benches of the weight push: here, at the real size, and its control path.

`python tools/bench push` runs on this machine; `scale` plans the real size, whose orders
`schedule_check` proves and `stream_queues` runs; `control` has the control path of 256
processes, and `gloo_rates` what gloo moves between processes."""
