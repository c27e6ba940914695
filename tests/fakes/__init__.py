"""Stand-ins for parts of a run that tests share: one module per role."""
