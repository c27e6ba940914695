"""The parts of `megatron-r1 score`, which grades lines, or audits grades with `--audit`.

`verb` grades; `audit_option` audits `audited_responses` and prints the result."""
