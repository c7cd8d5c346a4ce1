"""Using a model: loading, generation and reuse of prompt prefixes."""
