"""Experts in memory: which ones stay, in which slots, within which budget, and the engine that owns them."""
