"""The command line's verbs, one module each: it sets up the roles it needs and runs them."""
