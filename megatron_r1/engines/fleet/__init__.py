"""Several rollout engines, as the one object that samples (`rollout_fleet`): `engine` is one of
them, `dispatch` divides requests among them, `recovery` retries and replaces, `placement` says
where they start, `host`, `host_pool` and `host_messages` are engines on other hosts."""
