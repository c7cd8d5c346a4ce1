"""Using a model: load, generate, prompt prefixes that are kept."""
