"""Engines on other hosts, which come and go: the controller's side (`pool`, `places`,
`remote_server`), the host's (`engines`, `link`), and what travels between them (`wire`). The host's
command is `rollout.host`."""
