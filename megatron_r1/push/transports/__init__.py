"""Moves bytes from trainer ranks into an engine rank's memory.

A transport is a `Receiver` and a `Sender` (see base.py) in a module here, and its row of
`base.transports.TRANSPORTS`. Its name in vLLM is weight-transfer backend `megatron_r1_<name>`."""

from megatron_r1.push.transports.transport_classes import receiver_class, sender_class
