"""Forecasts without a model: memory plan, simulated hit rate, expected speed."""
