"""The HTTP gateway that agents of any make reach the policy through; docs/gateway.md."""

from megatron_r1.agents.gateway.server import Gateway
from megatron_r1.agents.gateway.session import GatewaySession, SessionLimits, TurnSampling
