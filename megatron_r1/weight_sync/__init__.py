"""Weights from the trainer's ranks to the engines' ranks: plan, send, receive, verify."""
