"""What a person launches: each stage sets up the roles it needs and runs its loop."""
