"""Environments that come with this package, one a file (`agents.environment.SHIPPED`)."""
