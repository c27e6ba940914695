"""The controller's part of a push: `WeightBridge` (`bridge`) calls trainer ranks and engines.

`engine_links` divides the engines into sets and connects these with the trainer. No weight passes
here: trainer ranks send theirs to the engine ranks themselves (`megatron_r1.push`).

Delivery is here the whole of it: a version reaches every engine and is in use. A
`megatron_r1.push.table.Delivery` is one rectangle of one slot from one trainer rank;
`megatron_r1.engines.plugin.backend` checks, inside an engine, that it computes with what arrived.
"""
