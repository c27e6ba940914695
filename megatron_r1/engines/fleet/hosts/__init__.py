"""Engines on other hosts, which join and leave: the controller's side (`pool`, `records`,
`remote_server`), the host's (`local_engines`, and its command, `engines.fleet.host`), and their
messages (`wire`)."""
