"""Several engines, as the one object that samples (`engine_fleet`).

- `engine` is one of them, `fleet_state` which of them are up.
- `dispatch` divides requests among them, `request_retries` repeats requests that fail.
- `service_stats` and `draft_acceptance` measure what engines do; `engine_replacer` finds engines
  that fail and replaces them; `weight_swaps` has the calls of a push.
- `placement` says where they start; `host`, `local_engines`, `host_pool`, `host_messages` and
  `controller_address` are engines on other nodes, and `external_fleet` has servers that others
  started."""
