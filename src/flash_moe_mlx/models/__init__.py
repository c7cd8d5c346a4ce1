"""Model definitions, one file a model type."""
