"""config.json of released models, as their authors published them, one of each architecture."""
