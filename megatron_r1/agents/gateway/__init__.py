"""The HTTP gateway through which agents of other frameworks reach the policy (docs/gateway.md).
`server` accepts the requests, and `session` is an episode's. `chat`, `responses`, `messages` and
`tokens` are the protocols; each reads a `body`, and turns it into a `request`."""

from megatron_r1.agents.gateway.server import Gateway
from megatron_r1.agents.gateway.session import GatewaySession, SessionLimits, TurnSampling
