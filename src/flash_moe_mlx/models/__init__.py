"""Model definitions, one file per model type."""
