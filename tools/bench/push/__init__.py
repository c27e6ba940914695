"""Benches of the weight push: on this machine (`python tools/bench push`), planned at the real size
(`scale`, `schedule_check`), and the control path of 256 processes (`control`)."""
