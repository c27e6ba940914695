"""The one train step that SFT, RL and reward models share: SPMD ranks driven over ZeroMQ."""
