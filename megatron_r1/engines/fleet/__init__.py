"""Several rollout engines, as the one object that samples and repeats requests of engines that fail
(`rollout_fleet`): `engine` is one of them, `dispatch` divides requests among them, `recovery` finds
those that fail and replaces them, `placement` says where they start, `host`, `host_pool` and
`host_messages` are engines on other hosts, and `external_fleet` has servers that others started."""
