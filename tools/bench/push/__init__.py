"""Benches of the weight push: on this machine (`python tools/bench push`), planned at the real size
(`scale`, whose orders `schedule_check` proves and `stream_queues` runs), and the control path of
256 processes (`control`)."""
