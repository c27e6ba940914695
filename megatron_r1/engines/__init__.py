"""vLLM, in four parts.

`server` is one server as the controller drives it; `fleet` several of them, here and on other
nodes; `plugin` what runs inside vLLM; `episodes` what a played episode is, of responses of a
server. `fleet` and `episodes` import `server`; `plugin` imports none of the others."""
