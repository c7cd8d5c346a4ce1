"""Predictions without loading a model: memory plan, simulated hit rate, expected speed."""
