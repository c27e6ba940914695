"""The parts of `megatron-r1 score`, which grades lines, or audits grades with `--audit`.

`verb` grades, by `line_scoring`; `audit_option` prints what `verifier_audit` finds in
`audited_responses`."""
