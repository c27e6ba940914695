"""The trainer rank's half of a push: what it sends, and sending it."""
