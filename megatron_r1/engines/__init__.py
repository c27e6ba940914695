"""vLLM, in three parts.

`server` is one server as the controller drives it; `fleet` several of them, here and on other
hosts; `plugin` what runs inside vLLM. `fleet` imports `server`; `plugin` imports neither.
`episodes` has what a played episode is, of responses of a server."""
