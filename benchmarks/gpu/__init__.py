"""Decode and prompts of one checkpoint on a GPU: all experts in slots, or as few slots as work."""
