"""Engines on other hosts, which join and leave: the controller's side (`pool`, `records`,
`remote_server`), the host's (`local_engines`, `link`), and the messages between them (`wire`). The
host's command is `fleet.host`."""
